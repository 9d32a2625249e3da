// On a page narrower than figures are drawn for, a legend takes more lines: make room for them below, counted as
// _legend_rows of plots/style.py does.
const rows = (names, width) => {
  const widths = names.map((name) => 60 + 9 * name.length), room = width - 100;
  if (widths.reduce((sum, own) => sum + own, 0) <= room) return Math.min(1, widths.length);
  return Math.ceil(widths.length / Math.max(1, Math.floor(room / Math.max(...widths))));
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
