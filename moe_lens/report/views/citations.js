const data = JSON.parse(document.getElementById("data").textContent);
const root = document.getElementById("view");
let at = 0;

const controls = element(root, "div", "controls");
const told = element(root, "p");
const text = element(root, "div", "text");
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function draw() {
  const own = data.cases[at], known = own.values.filter((value) => value !== null);
  const top_ = Math.max(...known.map(Math.abs), 1e-9);
  controls.replaceChildren();
  for (const [label, by] of [["←", -1], ["→", 1]]) element(controls, "button", "", label).onclick = () => choose(at + by);
  element(controls, "span", "", `${at + 1} of ${data.cases.length}, ${own.id}`);
  if (known.length) legend(controls, DIVERGING, signed(-top_), signed(top_), "nats for the answer");
  else element(controls, "span", "", "no sentence of this context was left out");
  told.replaceChildren();
  element(told, "b", "", own.question);
  element(told, "span", "", ` ${own.answer || "(no answer)"}`);
  text.replaceChildren();
  own.texts.forEach((sentence, place) => {
    const span = element(text, "span", "token", sentence), value = own.values[place];
    element(text, "span", "", " ");
    if (value === null) return;
    const rgb = change(value, top_);
    Object.assign(span.style, { background: css(rgb), color: inkOn(rgb) });
    span.onmousemove = (event) => showTip(event, `sentence ${place + 1}: ${signed(value)}`);
    span.onmouseleave = (event) => showTip(event, "");
  });
}

function choose(place) {
  at = (place + data.cases.length) % data.cases.length;
  draw();
}

root.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    choose(at + (event.key === "ArrowRight" ? 1 : -1));
  }
});
draw();
