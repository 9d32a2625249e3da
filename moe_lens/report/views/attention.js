const data = JSON.parse(document.getElementById("data").textContent);
const root = document.getElementById("view");
const T = data.tokens.length, L = data.layers.length;
const gain = (l, t) => data.tuned[l][t] - data.base[l][t];
const mass = (rows, l, parts) => rows[l].reduce((sum, a, t) => sum + (parts.includes(data.parts[t]) ? a : 0), 0);
const percent = (before, after) => (before > 0 ? `${after >= before ? "+" : "−"}${Math.abs(100 * (after / before - 1)).toFixed(0)} %` : "–");
const GROUPS = { context: ["context", "answer"], answer: ["answer"] };

// Start at the layer in which the answer (or, without one, the context) gains most.
const aim = data.parts.includes("answer") ? GROUPS.answer : GROUPS.context;
const reach = (l) => mass(data.tuned, l, aim) - mass(data.base, l, aim);
let layer = [...Array(L).keys()].reduce((best, l) => (reach(l) > reach(best) ? l : best), 0);

const controls = element(root, "div", "controls");
const beside = element(root, "div", "beside");
const text = element(beside, "div", "text");
const summary = element(beside, "div");

function draw() {
  controls.replaceChildren();
  const buttons = element(controls, "span");
  data.layers.forEach((name, l) => {
    const button = element(buttons, "button", l === layer ? "on" : "", `layer ${name}`);
    button.onclick = () => choose(l);
  });
  const top_ = Math.max(...data.tokens.map((_, t) => Math.abs(gain(layer, t))), 1e-9);
  legend(controls, DIVERGING, (-top_).toFixed(3), `+${top_.toFixed(3)}`, "attention, tuned minus base");
  if (data.parts.includes("answer")) element(controls, "span", "token answer", "the answer in the context");
  text.replaceChildren();
  data.tokens.forEach((token, t) => {
    const span = element(text, "span", `token ${data.parts[t] || "plain"}`, token), rgb = change(gain(layer, t), top_);
    Object.assign(span.style, { background: css(rgb), color: inkOn(rgb) });
    const [before, after] = [data.base[layer][t], data.tuned[layer][t]];
    const told = `token ${t} ${visible(token)}\nbase ${before.toFixed(4)}, tuned ${after.toFixed(4)} (${percent(before, after)})`;
    span.onmousemove = (event) => showTip(event, told);
    span.onmouseleave = (event) => showTip(event, "");
  });
  drawSummary();
}

function drawSummary() {
  summary.replaceChildren();
  const table = element(summary, "table"), head = element(table, "tr");
  element(head, "th", "", "attention to");
  for (const name of Object.keys(GROUPS)) element(head, "th", "number", `the ${name}`);
  data.layers.forEach((name, l) => {
    const row = element(table, "tr", l === layer ? "on pick" : "pick");
    row.onclick = () => choose(l);
    element(row, "td", "", `layer ${name}`);
    for (const parts of Object.values(GROUPS)) {
      const [before, after] = [mass(data.base, l, parts), mass(data.tuned, l, parts)];
      element(row, "td", "number", `${before.toFixed(2)} → ${after.toFixed(2)} (${percent(before, after)})`);
    }
  });
}

function choose(l) {
  layer = (l + L) % L;
  draw();
}

root.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    choose(layer + (event.key === "ArrowRight" ? 1 : -1));
  }
});
draw();
