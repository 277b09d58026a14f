const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

function painted(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => painted(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, style)]));
}

function draw() {
  const style = getComputedStyle(root);
  for (const source of document.querySelectorAll("script[data-figure]")) {
    const figure = painted(JSON.parse(source.textContent), style);
    const chart = document.getElementById(source.dataset.figure);
    const rows = figure.data.filter((trace) => trace.showlegend !== false).length;
    if (chart.clientWidth < 420 && rows > 2) figure.layout.height += 20 * rows; // a legend of one column
    Plotly.react(chart, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }
  document.getElementById("dark").setAttribute("aria-checked", String(isDark()));
}

document.getElementById("dark").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  kept.set("fastdpo-theme", root.dataset.theme);
  draw();
});
system.addEventListener("change", draw);
draw();

const fitted = new ResizeObserver((seen) => seen.forEach(({ target }) => Plotly.Plots.resize(target)));
for (const chart of document.querySelectorAll(".chart")) fitted.observe(chart);

const follow = document.getElementById("follow");
if (follow) {
  follow.checked = kept.get("fastdpo-follow") !== "no";
  follow.addEventListener("change", () => kept.set("fastdpo-follow", follow.checked ? "yes" : "no"));
  setInterval(() => { if (follow.checked) location.reload(); }, 1000 * follow.dataset.seconds);
}
