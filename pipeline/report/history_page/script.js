// Draws the curves and heat maps of a page of histories; what there is to draw is in #data.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = 8;
  const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3], [4, 2]];
  const HEIGHT = () => (matchMedia("(max-width:640px)").matches ? 200 : 230);
  const off = new Set(); // runs that are not shown
  const charts = [];
  const heats = [];
  let along = "step";

  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const ink = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colour = (line) => ink(`c${line.runs[0] % COLOURS}`);
  const isShown = (each) => each.runs.some((run) => !off.has(run));

  const count = (value) => {
    for (const [size, suffix] of [[1e9, " G"], [1e6, " M"], [1e4, " k"]])
      if (Math.abs(value) >= size)
        return `${+(value / (size === 1e4 ? 1e3 : size)).toPrecision(4)}${suffix}`;
    return `${+value.toPrecision(4)}`;
  };
  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e4) return count(value);
    if (size > 0 && size < 1e-3) return value.toExponential(2);
    return `${+value.toPrecision(4)}`;
  };
  const placed = { step: "step", tokens: "tokens", hours: "hours" };

  // One table of all lines' points: uPlot wants them over the same places.
  const table = (lines) => {
    const tables = lines.map((line) => {
      const at = data.axes[line.axis][along];
      const xs = [];
      const ys = [];
      line.values.forEach((value, i) => {
        // two rows at the same place would end a line's order
        if (at[i] === null || value === null || (xs.length && at[i] <= xs[xs.length - 1])) return;
        xs.push(at[i]);
        ys.push(value);
      });
      return [xs, ys];
    });
    return uPlot.join(tables);
  };

  // The index of the place nearest to one where a line has a value.
  const nearest = (u, series, index) => {
    const values = u.data[series];
    if (values[index] !== null && values[index] !== undefined) return index;
    for (let far = 1; far < values.length; far++)
      for (const i of [index - far, index + far])
        if (values[i] !== null && values[i] !== undefined) return i;
    return index;
  };

  class ChartView {
    constructor(chart, key) {
      this.chart = chart;
      this.key = key;
      this.hidden = new Set();
      this.figure = make("figure", "chart");
      this.figure.setAttribute("aria-label", chart.title);
      const caption = make("figcaption");
      const title = make("span");
      title.append(make("b", "", chart.title), make("small", "", chart.unit && ` ${chart.unit}`));
      this.whole = make("button", "whole", "all");
      this.whole.hidden = true;
      this.whole.addEventListener("click", () => this.reset());
      caption.append(title, this.whole);
      this.place = make("div", "place");
      this.tip = make("div", "tip");
      this.tip.hidden = true;
      this.lines = make("div", "lines");
      this.buttons = chart.lines.map((line, i) => this.button(line, i));
      this.lines.append(...this.buttons);
      this.figure.append(caption, this.place, this.tip, this.lines);
    }

    button(line, i) {
      const made = make("button", "line");
      const key = make("i", "key");
      if (line.dash) key.classList.add("dashed");
      key.style.setProperty("--key", `var(--c${line.runs[0] % COLOURS})`);
      made.append(key, `${this.named(line)} `, make("b"));
      made.addEventListener("click", () => {
        if (!this.hidden.delete(i)) this.hidden.add(i);
        this.toggle();
      });
      return made;
    }

    named(line) {
      const run = data.runs[line.runs[0]].id;
      const more = line.runs.length > 1 ? ` +${line.runs.length - 1}` : "";
      return `${run}${more}: ${line.name}`;
    }

    draw() {
      if (this.plot) this.plot.destroy();
      this.points = table(this.chart.lines);
      const grid = { stroke: ink("rule"), width: 1 };
      const axis = { stroke: ink("soft"), grid, ticks: grid, font: "11px system-ui" };
      const values = (u, ticks) => ticks.map(figure);
      const options = {
        width: this.place.clientWidth || 400,
        height: HEIGHT(),
        scales: { x: { time: false } },
        legend: { show: false },
        focus: { alpha: 0.35 },
        cursor: {
          // who looks at one chart of a stage sees the same place in the others
          sync: { key: this.key },
          drag: { x: true, y: false, dist: 4 },
          focus: { prox: 24 },
          dataIdx: nearest,
          points: { size: 7 },
        },
        axes: [{ ...axis, values, space: 60, size: 28 }, { ...axis, values, size: 62 }],
        series: [{}].concat(this.chart.lines.map((line, i) => this.series(line, i))),
        hooks: {
          setCursor: [(u) => this.tell(u)],
          setScale: [(u, scale) => scale === "x" && this.zoomed(u)],
        },
      };
      this.plot = new uPlot(options, this.points, this.place);
      fingers(this.plot);
      this.tell(this.plot);
    }

    series(line, i) {
      const few = line.values.filter((value) => value !== null).length <= 40;
      return {
        label: this.named(line),
        stroke: colour(line),
        width: 1.6,
        dash: DASHES[line.dash % DASHES.length],
        spanGaps: true,
        points: { show: few, size: 5, width: 1 },
        show: isShown(line) && !this.hidden.has(i),
      };
    }

    toggle() {
      this.chart.lines.forEach((line, i) => {
        const show = isShown(line) && !this.hidden.has(i);
        if (this.plot.series[i + 1].show !== show) this.plot.setSeries(i + 1, { show });
        this.buttons[i].setAttribute("aria-pressed", String(show));
      });
    }

    // Beside each name its value where the cursor is, else the last one.
    tell(u) {
      const inside = u.cursor.left >= 0 && u.cursor.idx !== null;
      let best = null;
      this.chart.lines.forEach((line, i) => {
        const index = inside ? u.cursor.idxs[i + 1] : u.data[0].length - 1;
        const at = inside ? index : nearest(u, i + 1, index);
        const value = at === null || at === undefined ? null : u.data[i + 1][at];
        this.buttons[i].lastChild.textContent = figure(value);
        if (!inside || !u.series[i + 1].show || value === null || value === undefined) return;
        const far = Math.abs(u.valToPos(value, "y") - u.cursor.top);
        if (!best || far < best.far) best = { far, line, value, x: u.data[0][at] };
      });
      this.tip.hidden = !best || u.cursor.event === undefined || !this.pointed;
      if (!best) return;
      const where = `${placed[along]} ${count(best.x)}`;
      this.tip.textContent = `${this.named(best.line)} · ${where} · ${figure(best.value)}`;
      const right = u.cursor.left > u.width / 2;
      this.tip.style.left = right ? "auto" : `${u.cursor.left + 70}px`;
      this.tip.style.right = right ? `${u.width - u.cursor.left - 50}px` : "auto";
      this.tip.style.top = `${Math.max(30, u.cursor.top)}px`;
    }

    zoomed(u) {
      const xs = u.data[0];
      const { min, max } = u.scales.x;
      this.whole.hidden = !xs.length || (min <= xs[0] && max >= xs[xs.length - 1]);
    }

    reset() {
      for (const each of charts)
        if (each.key === this.key && each.plot.data[0].length) {
          const xs = each.plot.data[0];
          each.plot.setScale("x", { min: xs[0], max: xs[xs.length - 1] });
        }
    }
  }

  // Fingers have neither a hover nor a drag: one moves the cursor, two zoom.
  const fingers = (u) => {
    let began = null;
    const spread = (event) => {
      const box = u.over.getBoundingClientRect();
      const [a, b] = [...event.touches].map((touch) => touch.clientX - box.left);
      return [Math.min(a, b), Math.max(a, b)];
    };
    const moved = (event) => {
      const box = u.over.getBoundingClientRect();
      if (event.touches.length === 1) {
        const [touch] = event.touches;
        u.setCursor({ left: touch.clientX - box.left, top: touch.clientY - box.top });
        return;
      }
      event.preventDefault();
      if (!began) return;
      const [left, right] = spread(event);
      // the places under both fingers stay under them
      const per = (began.to - began.from) / Math.max(24, right - left);
      const min = began.from - left * per;
      u.setScale("x", { min, max: min + box.width * per });
    };
    u.over.addEventListener("touchstart", (event) => {
      began = null;
      if (event.touches.length !== 2) return moved(event);
      const [left, right] = spread(event);
      began = { from: u.posToVal(left, "x"), to: u.posToVal(right, "x") };
    }, { passive: true });
    u.over.addEventListener("touchmove", moved, { passive: false });
  };

  const heatView = (heat) => {
    const made = make("figure", "heat");
    made.append(make("figcaption", "", `${data.runs[heat.runs[0]].id}: ${heat.title}`));
    const cells = make("div", "cells");
    cells.style.gridTemplateColumns =
      `minmax(3rem,max-content) repeat(${heat.columns.length},minmax(2px,1fr))`;
    heat.rows.forEach((row, i) => {
      const name = make("span", "", row);
      name.title = row;
      cells.append(name);
      heat.columns.forEach((column, j) => {
        const value = heat.values[i][j];
        const cell = make("i");
        // an even share is in the middle
        const strength = Math.min(1, ((value || 0) * heat.rows.length) / 2);
        cell.style.setProperty("--heat", strength.toFixed(3));
        const share = value === null ? "–" : `${(100 * value).toFixed(1)} %`;
        cell.dataset.tip = `${row} · ${heat.across} ${column} · ${share}`;
        cells.append(cell);
      });
    });
    const ends = make("div", "ends");
    ends.append(make("span", "", `${heat.across} ${heat.columns[0]}`));
    ends.append(make("span", "", heat.columns[heat.columns.length - 1]));
    const tip = make("div", "tip");
    tip.hidden = true;
    const told = (event) => {
      const text = event.target.dataset && event.target.dataset.tip;
      tip.hidden = !text;
      if (!text) return;
      tip.textContent = text;
      const box = made.getBoundingClientRect();
      const x = event.clientX - box.left;
      tip.style.left = x < box.width / 2 ? `${x + 12}px` : "auto";
      tip.style.right = x < box.width / 2 ? "auto" : `${box.width - x + 12}px`;
      tip.style.top = `${event.clientY - box.top + 14}px`;
    };
    cells.addEventListener("pointermove", told);
    cells.addEventListener("pointerdown", told);
    cells.addEventListener("pointerleave", () => (tip.hidden = true));
    const scale = make("div", "scale");
    scale.append("no token", make("span", "ramp up"), "twice an even share, or more");
    made.append(cells, ends, scale, tip);
    heats.push({ made, runs: heat.runs });
    return made;
  };

  const fit = () => {
    for (const each of charts) {
      const width = each.place.clientWidth;
      if (each.plot && width && width !== each.plot.width)
        each.plot.setSize({ width, height: HEIGHT() });
    }
  };

  const controls = document.getElementById("controls");
  data.runs.forEach((run, i) => {
    const made = make("button");
    made.dataset.run = run.id;
    made.title = `${run.family}, begun ${run.begun}`;
    const swatch = make("span", "swatch");
    swatch.style.setProperty("--key", `var(--c${i % COLOURS})`);
    made.append(swatch, run.id);
    made.setAttribute("aria-pressed", "true");
    made.addEventListener("click", () => {
      if (!off.delete(i)) off.add(i);
      made.setAttribute("aria-pressed", String(!off.has(i)));
      for (const each of charts) each.toggle();
      for (const each of heats) each.made.hidden = !isShown(each);
    });
    controls.append(made);
  });

  const everything = document.getElementById("sections");
  data.sections.forEach((section) => {
    const made = make("section");
    made.append(make("h2", "", section.title));
    if (section.note) made.append(make("p", "read", section.note));
    const grid = make("div", "charts");
    const aside = make("div", "charts");
    const more = make("details");
    more.append(make("summary", "", "where a step's time goes"), aside);
    // what is folded away has no width yet
    more.addEventListener("toggle", fit);
    for (const chart of section.charts) {
      const view = new ChartView(chart, section.title);
      view.figure.addEventListener("pointerenter", () => (view.pointed = true));
      view.figure.addEventListener("pointerleave", () => {
        view.pointed = false;
        view.tip.hidden = true;
      });
      charts.push(view);
      (chart.aside ? aside : grid).append(view.figure);
    }
    const maps = make("div", "heats");
    maps.append(...section.heats.map(heatView));
    made.append(grid, maps);
    if (aside.childElementCount) made.append(more);
    everything.append(made);
  });
  const drawAll = () => {
    for (const each of charts) {
      each.draw();
      each.toggle();
    }
  };
  drawAll();
  document.getElementById("along").addEventListener("change", (event) => {
    along = event.target.value;
    drawAll();
  });
  matchMedia("(prefers-color-scheme:dark)").addEventListener("change", drawAll);
  new ResizeObserver(fit).observe(document.querySelector("main"));
})();
