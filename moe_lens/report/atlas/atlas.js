"use strict";
// Which view the address names, and the views of all experts, of a token, and of a search.
const main = document.querySelector("main"), asked = document.querySelector("input");
const address = (...words) => words.map(encodeURIComponent).join("/");

function gridPage(name, each) {
  const { about, measures, data } = loaded.get("shared");
  const measure = name ? measures.find((one) => one.name === name) : measures[0];
  if (!measure) return nothing(`This atlas has no measure ${name}.`)();
  element(main, "h1", "", "All experts");
  element(main, "p", "note", `${about}. Watched on ${data.join(", ")}. Each square is an expert: choose one for its page.`);
  const row = element(main, "div", "row"), choice = element(row, "select");
  choice.setAttribute("aria-label", "Coloured by");
  for (const one of measures) element(choice, "option", "", one.name).selected = one === measure;
  const label = element(row, "label"), box = element(label, "input");
  Object.assign(box, { type: "checkbox", checked: each });
  box.style.width = "auto";
  label.append(" each layer by itself");
  const change = () => (location.hash = address("grid", choice.value, ...(box.checked ? ["layer"] : [])));
  choice.onchange = box.onchange = change;
  element(main, "p", "note", `${measure.about}.`);
  const key = element(main, "div", "row");
  legend(key, measure.values, grid(main, measure.values, { each }), each);
  const first = section(main, "The highest", "");
  const order = measure.values.map((value, place) => [value, place]).filter(([value]) => value !== null);
  order.sort((one, other) => other[0] - one[0]);
  table(first, ["expert", `#${measure.name}`], order.slice(0, 10).map(([value, place]) => [
    (cell) => toExpert(cell, ...expertAt(place)), number(value),
  ]));
  return main;
}

function expertAt(place) {
  const { layers, experts } = loaded.get("shared");
  return [layers[Math.floor(place / experts)], place % experts];
}

async function tokenPage(id) {
  const entry = (await load("tokens")).find(([token]) => token === id);
  if (!entry) return nothing(`Token ${id} does not occur in the data.`);
  const [, text, count, shard] = entry, { layers, experts } = loaded.get("shared");
  const taken = (await load(`tokens-${shard}`))[id], values = [];
  for (const layer of layers) {
    const own = new Array(experts).fill(0), pairs = taken[layer] || [];
    for (let i = 0; i < pairs.length; i += 2) own[pairs[i]] = pairs[i + 1] / count;
    values.push(...own);
  }
  return () => {
    const head = element(main, "h1", "", "The token ");
    element(head, "span", "token", visible(text));
    element(main, "p", "note", `It occurs ${whole(count)} times in the data. Coloured: the share of its occurrences that take the expert. Of few occurrences a share says little.`);
    const key = element(main, "div", "row");
    legend(key, values, grid(main, values, { say: (value) => number(value, 2) }), false);
    const box = section(main, "Experts that take it most", "Of each layer the three that most of its occurrences take.");
    table(box, ["layer", "experts (share)"], layers.map((layer, l) => [String(layer), (cell) => {
      const own = values.slice(l * experts, (l + 1) * experts).map((value, e) => [value, e]);
      own.sort((one, other) => other[0] - one[0]);
      for (const [value, e] of own.slice(0, 3)) if (value) {
        toExpert(cell, layer, e);
        cell.append(` (${number(value, 2)})  `);
      }
    }]));
  };
}

async function searchPage(text) {
  const tokens = await load("tokens"), { layers, experts } = loaded.get("shared");
  const [layer, expert] = (text.match(/\d+/g) || []).map(Number);
  const wanted = text.trim().toLowerCase(), plain = (own) => own.trim().toLowerCase();
  const found = tokens.filter(([, own]) => own.toLowerCase().includes(wanted || text));
  found.sort((one, other) => (plain(other[1]) === wanted) - (plain(one[1]) === wanted) || other[2] - one[2]);
  return () => {
    element(main, "h1", "", `Search for “${text}”`);
    if (layers.includes(layer) && expert < experts) {
      const line = element(section(main, "Expert", ""), "p", "");
      link(line, `expert/${layer}/${expert}`, `layer ${layer}, expert ${expert}`);
    }
    const box = section(main, "Tokens of the data", found.length > 100 ? `The first 100 of ${found.length}.` : "");
    if (!found.length) return element(box, "p", "", "None of them contains this.");
    return table(box, ["token", "#occurrences"], found.slice(0, 100).map(([id, own, count]) => [
      (cell) => toToken(cell, id, own), whole(count),
    ]));
  };
}

const nothing = (text) => () => element(main, "p", "", text);

async function wanted() {
  const [view, first, second] = location.hash.slice(1).split("/").map(decodeURIComponent);
  if (view === "token") return tokenPage(Number(first));
  if (view === "find") return searchPage(first || "");
  if (view !== "expert") return () => gridPage(first, second === "layer");
  const page = await load(`expert-${Number(first)}-${Number(second)}`);
  return () => expertPage(main, Number(first), Number(second), page);
}

let turn = 0;
async function show() {
  const own = ++turn;
  const draw = await wanted().catch((error) => nothing(`Nothing to show here: ${error.message}.`));
  if (own !== turn) return;  // another view was asked for meanwhile
  main.replaceChildren();
  draw();
  const heading = main.querySelector("h1"), { title } = loaded.get("shared");
  document.title = heading ? `${heading.textContent}: ${title}` : title;
  window.scrollTo(0, 0);
}

function foot({ left_out, made_by }) {
  const footer = document.querySelector("footer");
  for (const [name, reason] of left_out) element(footer, "p", "", `Left out of this atlas: ${name}. ${reason}`);
  const box = element(footer, "details");
  element(box, "summary", "", "Where the numbers came from");
  element(box, "pre", "", made_by);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
}
const dark = window.matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches ? "dark" : "light");
dark.onchange = () => theme(dark.matches ? "dark" : "light");
document.querySelector(".theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

document.querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  const expert = asked.value.match(/^\D*(\d+)\D+(\d+)\s*$/), { layers, experts } = loaded.get("shared");
  const there = expert && layers.includes(Number(expert[1])) && Number(expert[2]) < experts;
  location.hash = there ? address("expert", expert[1], expert[2]) : address("find", asked.value);
};
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: "← ", ArrowRight: " →", ArrowUp: "↑ ", ArrowDown: "↓ " }[event.key];
  if (!step || !event.shiftKey || event.target.matches("input, select")) return;
  const to = [...document.querySelectorAll(".steps a")].find((one) => one.textContent.includes(step));
  if (to) location.hash = to.hash;
});
window.onhashchange = show;
load("shared").then((shared) => (foot(shared), show())).catch((error) => nothing(`This atlas is not whole: ${error.message}.`)());
