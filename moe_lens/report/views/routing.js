const data = JSON.parse(document.getElementById("data").textContent);
const root = document.getElementById("view");
const ROW = 15, HEAD = 40, GAP = 7;
const T = data.tokens.length, L = data.layers.length, E = data.experts;
const weights = data.panels.map((panel) => panel.layers.map((layer) => layer.map((pairs) => new Map(pairs))));
const weight = (p, l, t, e) => weights[p][l][t].get(e) || 0;
const top_ = Math.max(...data.panels.flatMap((p) => p.layers.flat(2)).map(([, w]) => w), 1e-9);
const room = (document.documentElement.clientWidth - 210) / data.panels.length - 20;
const CELL = Math.max(3, Math.min(11, Math.floor((room - GAP * L) / (L * E))));
const chosen = { token: T - 1, layer: L - 1, expert: 0, minus: false };
if (data.panels[0].layers[L - 1][T - 1].length) chosen.expert = data.panels[0].layers[L - 1][T - 1][0][0];

const left = (l) => l * (E * CELL + GAP);
const shown = (p, l, t, e) => weight(p, l, t, e) - (chosen.minus && p ? weight(0, l, t, e) : 0);
const colour = (p, value) => (chosen.minus && p ? change(value, top_) : amount(value, top_));
const part = (t) => data.parts[t] || "plain";

const controls = element(root, "div", "controls");
const texts = element(root, "div", "texts");
const grid = element(root, "div", "grid");
const detail = element(root, "div", "detail");

const labels = element(grid, "div", "labels");
element(labels, "span", "").className = "corner";
labels.firstChild.style.display = "block";
const labelOf = data.tokens.map((token, t) => {
  const label = element(labels, "div", part(t), token.replace(/\n/g, "⏎").trim() || visible(token).slice(1, -1));
  label.onclick = () => choose({ token: t });
  label.title = `token ${t}: ${visible(token)}`;
  return label;
});
const maps = data.panels.map((panel, p) => {
  const box = element(grid, "div", "map");
  const sized = (name, tall) => {
    const canvas = element(box, "canvas", name), scale = window.devicePixelRatio || 1;
    const wide = left(L) - GAP + 2;
    Object.assign(canvas, { width: wide * scale, height: tall * scale });
    Object.assign(canvas.style, { width: wide + "px", height: tall + "px" });
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    return { canvas, pen, wide };
  };
  const head = sized("head", HEAD), body = sized("body", T * ROW + 1);
  body.canvas.setAttribute("aria-label", `${panel.name}: gating weights, tokens down, layers and experts across`);
  const under = (event) => {
    const t = Math.floor(event.offsetY / ROW), l = Math.floor(event.offsetX / (E * CELL + GAP));
    const e = Math.floor((event.offsetX - left(l)) / CELL);
    return t >= 0 && t < T && l < L && e >= 0 && e < E ? { token: t, layer: l, expert: e } : null;
  };
  body.canvas.onmousemove = (event) => {
    const at = under(event);
    showTip(event, at && describe(p, at));
  };
  body.canvas.onmouseleave = (event) => showTip(event, "");
  body.canvas.onclick = (event) => choose(under(event) || {});
  return { head, body };
});

function describe(p, { token, layer, expert }) {
  const name = data.panels.length > 1 ? `${data.panels[p].name}\n` : "";
  const place = data.panels[p].layers[layer][token].findIndex(([e]) => e === expert);
  const taken = place < 0 ? "not taken" : `gating weight ${weight(p, layer, token, expert).toFixed(3)}, rank ${place + 1}`;
  return `${name}token ${token} ${visible(data.tokens[token])}\nlayer ${data.layers[layer]}, expert ${expert}: ${taken}`;
}

function drawMap(p) {
  const { head, body } = maps[p];
  head.pen.clearRect(0, 0, head.wide, HEAD);
  head.pen.fillStyle = "#222";
  head.pen.font = "bold 13px Helvetica, Arial, sans-serif";
  const name = data.panels[p].name + (chosen.minus && p ? ` minus ${data.panels[0].name}` : "");
  head.pen.fillText(name, 0, 13, head.wide);
  const pen = body.pen;
  pen.clearRect(0, 0, body.wide, T * ROW + 1);
  for (let l = 0; l < L; l++) {
    head.pen.font = "12px Helvetica, Arial, sans-serif";
    head.pen.fillStyle = l === chosen.layer ? "#000" : "#666";
    head.pen.fillText((E * CELL > 60 ? "layer " : "") + data.layers[l], left(l), 33, E * CELL);
    pen.fillStyle = "#f7f7f7";
    pen.fillRect(left(l), 0, E * CELL, T * ROW);
    for (let t = 0; t < T; t++) {
      const taken = new Set(weights[p][l][t].keys());
      if (chosen.minus && p) for (const e of weights[0][l][t].keys()) taken.add(e);
      for (const e of taken) {
        pen.fillStyle = css(colour(p, shown(p, l, t, e)));
        pen.fillRect(left(l) + e * CELL, t * ROW, CELL - (CELL > 4), ROW - 1);
      }
    }
  }
  pen.strokeStyle = "#222";
  pen.lineWidth = 1;
  pen.strokeRect(left(chosen.layer) + chosen.expert * CELL - 0.5, 0.5, CELL, T * ROW - 1);
  pen.strokeRect(0.5, chosen.token * ROW - 0.5, body.wide - 2, ROW);
}

function drawTexts() {
  texts.replaceChildren();
  data.panels.forEach((panel, p) => {
    const box = element(texts, "div");
    const minus = chosen.minus && p ? ` minus ${data.panels[0].name}` : "";
    const what = `layer ${data.layers[chosen.layer]}, expert ${chosen.expert}`;
    element(box, "h2", "", data.panels.length > 1 ? `${panel.name}${minus}: ${what}` : `Gating weight of ${what}`);
    const text = element(box, "div", "text");
    data.tokens.forEach((token, t) => {
      const span = element(text, "span", `token ${part(t)}${t === chosen.token ? " chosen" : ""}`, token);
      const value = shown(p, chosen.layer, t, chosen.expert), rgb = colour(p, value);
      if (value) Object.assign(span.style, { background: css(rgb), color: inkOn(rgb) });
      span.onclick = () => choose({ token: t });
      span.onmousemove = (event) => showTip(event, describe(p, { ...chosen, token: t }));
      span.onmouseleave = (event) => showTip(event, "");
    });
  });
}

function drawDetail() {
  detail.replaceChildren();
  const table = element(detail, "table");
  const head = element(table, "tr");
  element(head, "th", "", `token ${chosen.token} ${visible(data.tokens[chosen.token])}`);
  data.panels.forEach((panel) => element(head, "th", "", panel.name));
  for (let l = 0; l < L; l++) {
    const row = element(table, "tr", l === chosen.layer ? "on" : "");
    element(row, "td", "", `layer ${data.layers[l]}`);
    data.panels.forEach((panel, p) => {
      const cell = element(row, "td");
      panel.layers[l][chosen.token].forEach(([e, w], i) => {
        const alone = data.panels.some((_, other) => !weights[other][l][chosen.token].has(e));
        element(cell, alone ? "b" : "span", "", `${i ? ",  " : ""}${e} (${w.toFixed(2)})`);
      });
    });
  }
}

function drawControls() {
  controls.replaceChildren();
  if (data.panels.length > 1) {
    const button = element(controls, "button", chosen.minus ? "on" : "", `difference from ${data.panels[0].name}`);
    button.onclick = () => choose({ minus: !chosen.minus });
  }
  legend(controls, SEQUENTIAL, "0", top_.toFixed(2), "gating weight");
  if (chosen.minus) legend(controls, DIVERGING, (-top_).toFixed(2), `+${top_.toFixed(2)}`, "difference");
  if (data.parts.includes("answer")) element(controls, "span", "token answer", "the answer in the context");
}

function choose(change_) {
  Object.assign(chosen, change_);
  drawControls();
  drawTexts();
  data.panels.forEach((_, p) => drawMap(p));
  labelOf.forEach((label, t) => label.classList.toggle("chosen", t === chosen.token));
  drawDetail();
}

root.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const within = (value, count) => (value + count) % count;
  if (step[0]) choose({ token: within(chosen.token + step[0], T) });
  else if (event.shiftKey) choose({ layer: within(chosen.layer + step[1], L) });
  else choose({ expert: within(chosen.expert + step[1], E) });
  if (step[0]) labelOf[chosen.token].scrollIntoView({ block: "nearest" });
});
choose({});
