// Makes the charts out of the page's numbers. Where this fails, the pictures stay.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("numbers").textContent);
  const plots = [];
  const memo = (make, known = new Map()) => (i) => known.get(i) ?? known.set(i, make(i)).get(i);

  const steps = memo((i) => {
    const x = page.x[i];
    return x.steps ?? Array.from({ length: x.n }, (_, k) => x.from + k * x.by);
  });

  const floats = memo((text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Array.from(new Float32Array(bytes.buffer), (v) => (Number.isNaN(v) ? null : v));
  });

  const numbers = (line) => {
    const y = page.y[line.y];
    return typeof y === "string" ? floats(y) : Array(page.x[line.x].n).fill(y);
  };

  const whole = (() => {
    const all = page.x.map((_, i) => steps(i));
    const first = Math.min(...all.map((x) => x[0])), last = Math.max(...all.map((x) => x[x.length - 1]));
    const edge = Math.max(0.01 * (last - first), 0.5);
    return { min: first - edge, max: last + edge };
  })();
  let view = whole;

  function look(range) {
    view = range ?? whole;
    for (const plot of plots) plot.setScale("x", view);
    for (const button of document.querySelectorAll(".reset")) button.hidden = view === whole;
  }

  // Words and numbers

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const many = (step) => Math.round(step).toLocaleString("en");

  function number(v) {
    if (v === null || v === undefined) return "–";
    if (v === 0) return "0";
    const size = Math.abs(v);
    const text = size < 1e-3 || size >= 1e6 ? v.toExponential(3) : String(Number(v.toPrecision(4)));
    return text.replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
  }

  const nearest = (x, step) => {
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] <= step) low = middle;
      else high = middle;
    }
    return step - x[low] <= x[high] - step ? low : high;
  };

  // A line's number at a step; of steps that share their points, the least and the greatest.
  function said(line, step, kind) {
    const x = steps(line.x), unit = kind === "share" ? " %" : "";
    if (step === null) return number(line.last) + unit;
    if (step > x[x.length - 1] || step < x[0]) return "–";
    const at = nearest(x, step);
    if (!page.x[line.x].pairs) return number(line.values[at]) + (line.values[at] === null ? "" : unit);
    const [a, b] = [line.values[at - (at % 2)], line.values[at - (at % 2) + 1]];
    if (a === null || a === b) return number(a) + unit;
    return `${number(Math.min(a, b))} to ${number(Math.max(a, b))}${unit}`;
  }

  // Elements. Names are set as text, never as HTML.

  function element(tag, name, parent, text = "") {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function key(line, parent, area, title) {
    const button = element("button", "key", parent);
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const sample = element("span", "sample", button);
    sample.innerHTML = '<svg viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4h26"/></svg>';
    const path = sample.querySelector("path");
    path.setAttribute("class", line.color + (area ? " area" : ""));
    if (!area) path.setAttribute("stroke-dasharray", line.dash.join(" "));
    element("span", "name", button, line.label || title).title = line.label || title;
    return { button, value: element("span", "value", button) };
  }

  // A panel

  const dashes = ({ dash, turn: [place, of] }) =>
    of === 1 ? dash : place === 0 ? [6, 6 * (of - 1)] : [0, 6 * place, 6, 6 * (of - 1 - place)];

  const padded = (min, max) => {
    const room = max > min ? 0.05 * (max - min) : 0.1 * Math.abs(max) || 1;
    return [min - room, max + room];
  };

  const away = (v, up) => (v === 0 ? 0 : (v > 0) === up ? v * 1.3 : v / 1.3);

  function range(panel, min, max) {
    if (panel.kind === "share") return [0, 100];
    if (min === null || !Number.isFinite(min)) return panel.kind === "log" ? [1, 10] : [0, 1];
    if (panel.kind === "log") return [Math.max(min, panel.threshold) / 1.2, max * 1.2];
    return panel.kind === "symlog" ? [away(min, false), away(max, true)] : padded(min, max);
  }

  // Powers of ten between the ends, and steps between where there are few of them.
  function splits(panel, low, high, most) {
    const symmetric = panel.kind === "symlog", sides = [[1, symmetric ? panel.threshold : low, high]];
    if (symmetric && low < 0) sides.push([-1, panel.threshold, -low]);
    let found = [];
    for (const factors of [[1], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
      found = symmetric && low <= 0 ? [0] : [];
      for (const [sign, begin, end] of sides)
        for (let decade = Math.floor(Math.log10(begin)); begin <= end && decade <= Math.log10(end); decade++)
          for (const factor of factors) {
            const value = Number(`${factor}e${decade}`);
            if (value >= 0.999 * begin && value <= end) found.push(sign * value);
          }
      if (found.length >= 3) break;
    }
    found.sort((a, b) => a - b);
    const stride = Math.ceil(found.length / most), middle = Math.max(found.indexOf(0), 0);
    return found.filter((_, i) => (i - middle) % stride === 0);
  }

  // As they are drawn: a logarithm has no 0, and areas stand on one another, the highest first.
  function drawn(panel) {
    const { lines, kind } = panel;
    if (kind !== "share") {
      const shape = (line) => (kind === "log" ? line.values.map((v) => (v > 0 ? v : null)) : line.values);
      return uPlot.join(lines.map((line) => [steps(line.x), shape(line)]));
    }
    const below = new Array(steps(lines[0].x).length).fill(0);
    const tops = lines.map((line) => line.values.map((v, i) => {
      if (v !== null && line.shown) below[i] += v;
      return v === null || !line.shown ? null : below[i];
    }));
    return [steps(lines[0].x), ...tops.reverse()];
  }

  const alone = (y) => y.flatMap((v, i) => (v != null && y[i - 1] == null && y[i + 1] == null ? [i] : []));

  function series(panel) {
    const area = panel.kind === "share", all = area ? [...panel.lines].reverse() : panel.lines;
    return all.map((line) => ({
      label: line.label,
      scale: "y",
      show: line.shown,
      width: area ? 0.6 : line.wide ? 2.2 : 1.6,
      stroke: () => css(area ? "paper" : line.color),
      ...(area ? { fill: () => css(line.color) } : { dash: dashes(line) }),
      points: { size: 5, filter: (plot, i, all) => (all ? null : alone(plot.data[i])) },
    }));
  }

  function marked(plot, runs) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    for (const [level, at] of runs.flatMap((i) => Object.entries(page.marks[i]))) {
      const seen = at.map((step) => plot.valToPos(step, "x", true))
        .filter((x) => x >= bbox.left && x <= bbox.left + bbox.width);
      ctx.fillStyle = ctx.strokeStyle = css(level);
      ctx.lineWidth = ratio;
      for (const x of seen) {
        const y = bbox.top - (level === "nonfinite" ? 1 : 6) * ratio, r = 4 * ratio;
        ctx.globalAlpha = 1;
        ctx.beginPath();
        ctx.moveTo(x - r, y - r), ctx.lineTo(x + r, y - r), ctx.lineTo(x, y + r / 2);
        ctx.fill();
        if (seen.length > 12) continue;
        ctx.globalAlpha = 0.5;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top), ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  function options(chart, panel, box) {
    const axis = { stroke: () => css("soft"), grid: { stroke: () => css("line"), width: 1 }, ticks: { show: false } };
    const font = "12px system-ui, sans-serif";
    const log = panel.kind === "log" ? 3 : panel.kind === "symlog" ? 4 : 1;
    const most = chart.small ? 4 : 8;
    const heights = log > 1 ? { filter: (_, at) => at, splits: (_, __, low, high) => splits(panel, low, high, most) } : {};
    return {
      width: box.clientWidth,
      height: chart.small ? 170 : 300,
      padding: [panel.runs.length ? 16 : 8, 22, 0, 0],
      legend: { show: false },
      focus: { alpha: 0.25 },
      cursor: {
        drag: { x: true, y: false, setScale: false },
        focus: { prox: panel.kind === "share" || panel.lines.length < 2 ? -1 : 24 },
        points: { show: panel.kind !== "share", size: 7 },
        sync: {
          key: "steps",
          setSeries: false,
          scales: ["x", null],
          filters: { pub: (type) => !["mousedown", "mouseup", "dblclick"].includes(type) },
        },
        bind: { dblclick: () => () => look(null) },
      },
      scales: {
        x: { time: false, range: () => [view.min, view.max] },
        y: { distr: log, asinh: panel.threshold, range: (_, min, max) => range(panel, ...extent(chart, panel, min, max)) },
      },
      axes: [
        { ...axis, font, size: 34, values: (_, at) => at.map((v) => (v === Math.round(v) ? many(v) : "")) },
        { ...axis, font, size: 66, ...heights, values: (_, at) => at.map((v) => (v === null ? "" : number(v) + (panel.kind === "share" ? " %" : ""))) },
      ],
      series: [{}, ...series(panel)],
      hooks: {
        draw: [(plot) => marked(plot, panel.runs)],
        setCursor: [(plot) => tell(panel, plot.cursor.idx == null ? null : plot.data[0][plot.cursor.idx])],
        setSelect: [(plot) => {
          const { left, width } = plot.select;
          if (width < 4) return;
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          look({ min: plot.posToVal(left, "x"), max: plot.posToVal(left + width, "x") });
        }],
      },
    };
  }

  // Panels side by side have the same heights, as long as all steps are seen.
  function extent(chart, panel, min, max) {
    if (chart.small || view !== whole || chart.panels.length === 1) return [min, max];
    const all = chart.panels.flatMap((p) => p.lines.filter((line) => line.shown)).map((line) => line.extent);
    const known = all.filter(([low]) => low !== null);
    return known.length ? [Math.min(...known.map((e) => e[0])), Math.max(...known.map((e) => e[1]))] : [min, max];
  }

  function extentOf(values, positive) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v !== null && !(positive && v <= 0)) (low = Math.min(low, v)), (high = Math.max(high, v));
    return low > high ? [null, null] : [low, high];
  }

  function tell(panel, step) {
    const x = page.x[panel.lines[0].x];
    const at = step === null ? "at the end" : x.few ? `around step ${many(step)}` : `step ${many(step)}`;
    if (panel.told === at) return;
    panel.told = at;
    panel.step.textContent = at;
    for (const line of panel.lines) line.key.value.textContent = said(line, step, panel.kind);
  }

  function show(plot, panel, shown) {
    panel.lines.forEach((line, i) => {
      line.shown = shown(line);
      line.key.button.setAttribute("aria-pressed", String(line.shown));
      if (panel.kind !== "share") plot.setSeries(i + 1, { show: line.shown }, false);
    });
    if (panel.kind === "share") plot.setData(drawn(panel), true);
    plot.setScale("x", view);
  }

  function keys(plot, panel) {
    panel.lines.forEach((line, i) => {
      const only = () => panel.lines.every((other) => other.shown === (other === line));
      line.key.button.addEventListener("click", (event) => {
        if (event.shiftKey) show(plot, panel, only() ? () => true : (other) => other === line);
        else show(plot, panel, (other) => (other === line ? !other.shown : other.shown));
      });
      if (panel.kind === "share") return;
      const focus = (on) => () => plot.setSeries(on ? i + 1 : null, { focus: true }, false);
      for (const [type, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
        line.key.button.addEventListener(type, focus(on));
    });
  }

  function arrows(plot, box) {
    box.addEventListener("keydown", (event) => {
      const x = plot.data[0], by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") look(null);
      if (!by) return;
      event.preventDefault();
      const at = (plot.cursor.idx ?? (by > 0 ? -1 : x.length)) + by * (event.shiftKey ? 10 : 1);
      const left = plot.valToPos(x[Math.min(Math.max(at, 0), x.length - 1)], "x");
      plot.setCursor({ left, top: 0 }, true, true);
    });
  }

  function make(chart, figure) {
    const area = element("div", chart.small ? "live small" : "live", figure);
    const reset = element("button", "reset", area, "Show all steps");
    reset.type = "button";
    reset.hidden = true;
    reset.addEventListener("click", () => look(null));
    const alt = figure.querySelector("img").alt;
    for (const panel of chart.panels) {
      const part = element("div", "panel", area), head = element("div", "head", part);
      element("span", "title", head, panel.title || chart.unit);
      panel.step = element("span", "at", head);
      const box = element("div", "box", part), names = element("div", "keys", part);
      box.tabIndex = 0;
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", panel.title ? `${panel.title}. ${alt}` : alt);
      for (const line of panel.lines) {
        line.values = numbers(line);
        line.shown = true;
        line.extent = extentOf(line.values, panel.kind === "log");
        line.key = key(line, names, panel.kind === "share", panel.title);
      }
      const plot = new uPlot(options(chart, panel, box), drawn(panel), box);
      plots.push(plot);
      keys(plot, panel);
      arrows(plot, box);
      tell(panel, null);
      new ResizeObserver(() => {
        if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: plot.height });
      }).observe(box);
    }
    return area;
  }

  for (const chart of page.charts) {
    const figure = document.getElementById(`chart-${chart.name}`), before = plots.length;
    figure.classList.add("drawn"); // its width is known only where it is seen
    try {
      make(chart, figure);
    } catch (error) {
      plots.length = before;
      figure.classList.remove("drawn");
      figure.querySelector(".live")?.remove();
      console.error(error);
    }
  }
  if (plots.length) document.body.classList.add("scripted");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw(false)));
})();
