"use strict";
// The page of one expert.
function expertPage(main, layer, expert, page) {
  const { layers, experts, data } = loaded.get("shared"), l = layers.indexOf(layer);
  element(main, "h1", "", `Layer ${layer}, expert ${expert}`);
  for (const [label, by] of page.label) {
    element(main, "p", "note", `“${label}”, as ${by} puts what the places below have in common; nobody has checked it.`);
  }
  const steps = element(main, "nav", "steps");
  const go = (text, to, e) => to !== undefined && link(steps, `expert/${to}/${(e + experts) % experts}`, text);
  go("← expert before", layer, expert - 1);
  go("expert after →", layer, expert + 1);
  go("↑ layer before", layers[l - 1], expert);
  go("↓ layer after", layers[l + 1], expert);
  const columns = element(main, "div", "columns");
  for (const part of [useOf, toldOf, contextsOf, tokensOf, writtenOf, partnersOf, alikeOf, pathsOf, scoresOf, dosesOf]) {
    part(columns, page, { layer, expert, layers, data, l });
  }
}

function useOf(parent, { use, saliency }, { data }) {
  const box = section(parent, "How much it is used", "The share of tokens that take it, with its 95 % interval over texts; the mean gating weight where it is taken, and how often it then has the highest of all.");
  const top = Math.max(...use.map(([, rate]) => rate), 1e-12);
  const shown = data.length > 1 ? use : use.filter(([name]) => name);
  table(box, ["data", "#tokens", "#rate", "", "#interval", "#weight", "#first"], shown.map(
    ([name, rate, low, high, weight, first, tokens]) => [
      name || "all together", whole(tokens), number(rate),
      (cell) => (element(cell, "span", "bar").style.width = `${Math.round((60 * rate) / top)}px`),
      between(low, high), number(weight), number(first, 2),
    ]));
  for (const [reap] of saliency) {
    element(box, "p", "note", `REAP, the mean of gating weight times the norm of its output where it is taken: ${number(reap)}.`);
  }
}

function toldOf(parent, { told }) {
  if (!told.length) return;
  const box = section(parent, "How much the token tells", "Of the variance of whether a token takes it, the share that the token's identity tells in other examples (1: the token decides; 0: it says nothing), and that it tells together with the token before.");
  const [token, low, high, bigram, bigramLow, bigramHigh] = told[0];
  table(box, ["known", "#told", "#interval"], [
    ["the token", number(token, 2), between(low, high, 2)],
    ["and the one before", number(bigram, 2), between(bigramLow, bigramHigh, 2)],
  ]);
}

function contextsOf(parent, { contexts }, { data }) {
  const box = section(parent, "Where it has the most weight", "Places with its highest gating weights, in bold underlined the token that takes it, coloured by its weight at every token. Of places with the same last four tokens one is shown.");
  if (!contexts.length) element(box, "p", "", "No token takes it.");
  const top = Math.max(...contexts.map((one) => one[3]), 1e-12);
  for (const name of data) {
    const own = contexts.filter(([of]) => of === name);
    if (own.length && data.length > 1) element(box, "h3", "", name);
    for (const [, id, position, weight, place, texts, weights] of own) {
      const context = element(box, "div", "context");
      texts.forEach((text, i) => {
        const token = element(context, i === place ? "b" : "span", "", i === place ? text || "∅" : text);
        if (weights[i]) heat(token, weights[i], top);
        if (weights[i]) token.title = `weight ${number(weights[i])}`;
      });
      element(context, "small", "", `weight ${number(weight)}, token ${position} of ${id}`);
    }
  }
}

function tokensOf(parent, { often, mostly }) {
  if (!often.length) return;
  const box = section(parent, "Tokens that take it", "By how often they do, and by the share of their occurrences in which they do (of tokens that occur ten times or more).");
  for (const [heading, rows] of [["most often", often], ["most regularly", mostly]]) {
    element(box, "h3", "", heading);
    table(box, ["token", "#taken", "#of", "#share"], rows.map(([id, text, count, selected, share]) => [
      (cell) => toToken(cell, id, text), whole(selected), whole(count), number(share, 2),
    ]));
  }
}

function writtenOf(parent, { written }) {
  if (!written.length) return;
  const box = section(parent, "What it writes", "Tokens of the vocabulary whose logits it raises most beyond the mean expert of its layer: the head's reading of its mean output times gating weight (logit lens, before the final norm). Tokens that no training had as an answer move together, so that a list of them may say little.");
  for (const [heading, read] of [["of tokens in the data", 1], ["of all others", 0]]) {
    const rows = written.filter((row) => row[4] === read);
    if (!rows.length) continue;
    element(box, "h3", "", heading);
    table(box, ["token", "#beyond the mean", "#logit"], rows.map(([id, text, excess, logit]) => [
      (cell) => (read ? toToken(cell, id, text) : element(cell, "span", "token", visible(text))), number(excess, 2), number(logit, 2),
    ]));
  }
}

function partnersOf(parent, { partners }, { layer }) {
  if (!partners.length) return;
  const box = section(parent, "Partners", "Experts of the layer that tokens of this one take more often than all tokens do, as far as the interval is sure of it, the surest first.");
  table(box, ["expert", "#of its tokens", "#interval", "#of all", "#ratio"], partners.map(([other, share, low, high, rate, ratio]) => [
    (cell) => toExpert(cell, layer, other), number(share), between(low, high), number(rate), number(ratio, 2),
  ]));
}

function alikeOf(parent, { outputs, routers }, { layer }) {
  if (!outputs.length && !routers.length) return;
  const box = section(parent, "Neighbours", "Experts of the layer that are most like it: by the mean cosine of both outputs where a token takes both, and by the cosine of the router's rows.");
  if (outputs.length) table(box, ["by output", "#cosine", "#tokens of both"], outputs.map(([other, together, cosine]) => [
    (cell) => toExpert(cell, layer, other), number(cosine, 2), whole(together),
  ]));
  if (routers.length) table(box, ["by router row", "#cosine"], routers.map(([other, cosine]) => [
    (cell) => toExpert(cell, layer, other), number(cosine, 2),
  ]));
}

function pathsOf(parent, { before, after }, { layers, l }) {
  if (!before.length && !after.length) return;
  const box = section(parent, "Paths", "Experts of the layers next to it that its tokens take more often than all tokens do, as far as the interval is sure of it, the surest first. Ratio: P(later | earlier) over P(later), 1 where layers choose independently.");
  for (const [heading, rows] of [[`from layer ${layers[l - 1]}`, before], [`to layer ${layers[l + 1]}`, after]]) {
    if (!rows.length) continue;
    element(box, "h3", "", heading);
    table(box, ["expert", "#P(later | earlier)", "#P(later)", "#ratio", "#interval"], rows.map(
      ([of, other, share, rate, ratio, low, high]) => [
        (cell) => toExpert(cell, of, other), number(share), number(rate), number(ratio, 2), between(low, high, 2),
      ]));
  }
}

function scoresOf(parent, { scores }) {
  if (!scores.length) return;
  const box = section(parent, "Scores and effects", "What runs say of it: the score, its interval where it has one, and its rank in the layer from the highest.");
  table(box, ["run", "score", "#value", "#interval", "#rank"], scores.map(([run, name, score, low, high, rank, among]) => [
    run, name, number(score), between(low, high), `${rank} of ${among}`,
  ]));
}

function dosesOf(parent, { doses }, { layer, expert }) {
  if (!doses.length) return;
  const box = section(parent, "Dose curves", "Exact match at each strength of an intervention on a set that it is in; grey: from the lowest to the highest random set of the same size; dashed: nothing changed.");
  for (const dose of doses) {
    const figure = element(box, "figure");
    curve(figure, dose);
    const others = dose.experts.split(";").reduce((sum, one) => sum + one.split(",").length, 0) - 1;
    const together = others ? `together with ${others} more` : "alone";
    element(figure, "figcaption", "", `${dose.mode} of ${dose.set}${dose.task ? ` on ${dose.task}` : ""}, ${layer}.${expert} ${together} (${dose.run})`);
  }
}

function curve(parent, { points, random, unmasked, mode }) {
  const W = 440, H = 190, left = 38, bottom = 34;
  const all = [...points, ...random].map(([strength]) => strength);
  const low = Math.min(...all), high = Math.max(...all);
  const x = (value) => left + ((value - low) / (high - low || 1)) * (W - left - 14);
  const y = (value) => 8 + (1 - value) * (H - 8 - bottom);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("role", "img");
  const draw = (tag, given, text) => {
    const made = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  const label = (text, at, down, anchor) => draw("text", { x: at, y: down, "text-anchor": anchor, "font-size": 11, fill: "currentColor" }, text);
  for (const value of [0, 0.5, 1]) {
    draw("line", { x1: left, x2: W - 14, y1: y(value), y2: y(value), stroke: "var(--line)" });
    label(value, left - 6, y(value) + 4, "end");
  }
  for (const [strength] of points) label(strength, x(strength), H - bottom + 14, "middle");
  label(`strength (${mode}); exact match up`, (W + left) / 2, H - 4, "middle");
  if (random.length > 1) {
    const edge = [...random.map(([s, , most]) => [s, most]), ...random.map(([s, least]) => [s, least]).reverse()];
    draw("polygon", { points: edge.map(([s, v]) => `${x(s)},${y(v)}`).join(" "), fill: "var(--soft)", opacity: 0.3 });
  }
  if (unmasked !== null) draw("line", { x1: left, x2: W - 14, y1: y(unmasked), y2: y(unmasked), stroke: "currentColor", "stroke-dasharray": "5 4" });
  draw("polyline", { points: points.map(([s, em]) => `${x(s)},${y(em)}`).join(" "), fill: "none", stroke: "var(--much)", "stroke-width": 2 });
  for (const [s, em, least, most] of points) {
    if (least !== null) draw("line", { x1: x(s), x2: x(s), y1: y(least), y2: y(most), stroke: "var(--much)" });
    draw("circle", { cx: x(s), cy: y(em), r: 3.5, fill: "var(--much)" });
  }
  parent.append(svg);
}
