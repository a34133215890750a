"use strict";
// The switch between steps and tokens, and the values under the pointer. The charts stand without it.

for (const button of document.querySelectorAll(".switch button")) {
  button.addEventListener("click", () => {
    document.body.dataset.x = button.dataset.x;
    for (const other of document.querySelectorAll(".switch button"))
      other.setAttribute("aria-pressed", String(other === button));
  });
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= limit) return (value / (unit === "k" ? 1e3 : limit)).toPrecision(4) + unit;
  return String(Number(value.toPrecision(5)));
}

function nearest(sorted, target) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < target) low = middle + 1; else high = middle;
  }
  return low > 0 && target - sorted[low - 1] < sorted[low] - target ? low - 1 : low;
}

function element(parent, name, css, text = "") {
  const made = parent.appendChild(document.createElement(name));
  made.className = css;
  made.textContent = text;
  return made;
}

for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, width, height] = data.plot;
  const scale = data.log ? Math.log : (value) => value;
  const [low, high] = data.y.map(scale);
  for (const plot of figure.querySelectorAll(".plot")) {
    const svg = plot.querySelector("svg");
    const axis = svg.dataset.x;
    const [first, last] = svg.dataset.range.split(" ").map(Number);
    const layer = element(plot, "div", "");
    const clear = () => layer.replaceChildren();
    plot.addEventListener("pointerleave", clear);
    plot.addEventListener("pointermove", (event) => {
      clear();
      const box = svg.getBoundingClientRect();
      const unit = box.width / svg.viewBox.baseVal.width;
      const share = Math.min(1, Math.max(0, ((event.clientX - box.left) / unit - left) / width));
      const target = first + share * (last - first);
      const found = data.series
        .filter((series) => series.y.length)
        .map((series) => ({ series, at: nearest(series[axis], target) }));
      if (!found.length) return;
      const gaps = found.map(({ series, at }) => Math.abs(series[axis][at] - target));
      const closest = found[gaps.indexOf(Math.min(...gaps))];
      const x = closest.series[axis][closest.at];
      const pixel = (value) => (left + ((value - first) / (last - first)) * width) * unit;
      const hair = element(layer, "div", "hair");
      hair.style.cssText = `left:${pixel(x)}px;top:${top * unit}px;height:${height * unit}px`;
      const tip = element(layer, "div", "tip");
      element(tip, "strong", "", `${axis} ${axis === "step" ? x : short(x)}`);
      for (const { series, at } of data.stacked ? [...found].reverse() : found) {
        const value = series.y[at];
        const line = element(tip, "span", "");
        element(line, "i", "").style.setProperty("--c", `var(--c${series.color})`);
        const elsewhere = series[axis][at] === x ? "" : ` at ${short(series[axis][at])}`;
        line.append(series.name + elsewhere);
        const shown = data.percent ? `${(100 * value).toPrecision(3)}%` : value === null ? "" : short(value);
        element(line, "b", "", value === null ? "not finite" : shown);
        const y = value === null ? NaN : (scale(value) - low) / (high - low);
        if (data.stacked || !(y >= 0 && y <= 1)) continue;
        const dot = element(layer, "div", "point");
        dot.style.setProperty("--c", `var(--c${series.color})`);
        dot.style.left = `${pixel(series[axis][at])}px`;
        dot.style.top = `${(top + (1 - y) * height) * unit}px`;
      }
      const beside = pixel(x) > box.width / 2 ? pixel(x) - tip.offsetWidth - 12 : pixel(x) + 12;
      tip.style.left = `${beside}px`;
      tip.style.top = `${top * unit + 4}px`;
    });
  }
}
