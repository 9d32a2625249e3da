// On a page narrower than figures are drawn for, a legend takes more lines: make room for them below, counted as
// _legend_rows of plots/style.py does.
const rows = (names, width) => {
  let count = 0, room = 0;
  for (const name of names) {
    const needed = 60 + 9 * name.length;
    if (needed > room) { count += 1; room = width - 100; }
    room -= needed;
  }
  return count;
};
const figures = [...document.querySelectorAll(".js-plotly-plot")]
  .map((figure) => ({ figure, height: figure.layout.height, bottom: figure.layout.margin.b }));
const fit = () => {
  for (const { figure, height, bottom } of figures) {
    const names = figure.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name || "");
    const more = 30 * Math.max(0, rows(names, figure.clientWidth) - rows(names, WIDTH));
    if (figure.layout.showlegend !== false && height + more !== figure.layout.height)
      Plotly.relayout(figure, { autosize: true, height: height + more, "margin.b": bottom + more });
  }
};
fit();
addEventListener("resize", fit);
