"use strict";
// What is drawn: series of runs, thinned, as curves; heat maps; marks. Text of others is never markup: see `plain`.

const DATA = JSON.parse(document.getElementById("page-data").textContent);
const AXES = {step: "step", tokens: "tokens", flops: "FLOPs, causal attention", hours: "hours of steps"};
const MARKS = {stage: "stage begins", spike: "spike", "roll-back": "rolled back", decision: "decision", change: "configuration"};
const MOST_FAINT = 8; // curves of a chart that are drawn unsmoothed, too, behind the smoothed ones
const PHONE = matchMedia("screen and (max-width: 760px)");
const STATE = {axis: "step", smoothing: 0.6, marks: true, reload: true, ...remembered("k2jax-state")};

// A page of a file may have no storage.
function remembered(key) { try { return JSON.parse(sessionStorage.getItem(key)) || {}; } catch { return {}; } }
function remember() { try { sessionStorage.setItem("k2jax-state", JSON.stringify(STATE)); } catch { /* as above */ } }
// Of plotly's buttons those that stay on this page: one of the others sends a chart to plotly's own site.
const CONFIG = {
  displaylogo: false, responsive: true, displayModeBar: "hover", plotlyServerURL: "", topojsonURL: "none:",
  modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
};

// Plotly takes some markup in names and labels.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css(`--line${i % 10}`);

// ---- numbers ----------------------------------------------------------------------------------------------------------

const runOf = (key) => DATA.runs[key];
const axesOf = (key) => runOf(key)?.axes || runOf("0").axes;

function axisFor(keys) {
  return keys.every((key) => axesOf(key)[STATE.axis].length) ? STATE.axis : "step";
}

// Steps as another axis has them: evenly between knots.
function onAxis(key, steps, axis) {
  if (axis === "step") return steps;
  const {step: knots, [axis]: values} = axesOf(key);
  const last = knots.length - 1;
  return steps.map((step) => {
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (knots[middle] <= step) low = middle; else high = middle;
    }
    const share = last ? (step - knots[low]) / (knots[high] - knots[low]) : 0;
    return values[low] + share * (values[high] - values[low]);
  });
}

function series(key, name) {
  const run = runOf(key);
  const found = run && run.series.find(([other]) => other === name);
  return found && {run, ...found[1]};
}

// The means of buckets, at their middles.
function means(found) {
  const {run, mean} = found, x = [], y = [];
  mean.forEach((value, i) => {
    const first = run.base + i * run.width;
    x.push((first + Math.min(first + run.width - 1, run.last)) / 2);
    y.push(value);
  });
  return {x, y};
}

// Every bucket's least and greatest value, each at its own step.
function extremes(found) {
  const {run, low, high} = found;
  if (!low) return means(found);
  const x = [], y = [];
  low.forEach((value, i) => {
    if (value === null) { x.push(run.base + i * run.width); y.push(null); return; }
    const first = run.base + i * run.width;
    const ends = [[first + found.low_at[i], value], [first + found.high_at[i], high[i]]];
    if (ends[0][0] > ends[1][0]) ends.reverse();
    if (ends[0][0] === ends[1][0]) ends.pop();
    for (const [at, v] of ends) { x.push(at); y.push(v); }
  });
  return {x, y};
}

// Exponential moving average, without the bias of its beginning.
function smooth(values, amount) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = amount * sum + (1 - amount) * value;
    weight = amount * weight + (1 - amount);
    return sum / weight;
  });
}

const scaled = (values, by) => (by ? values.map((value) => (value === null ? null : value * by)) : values);

// ---- curves -----------------------------------------------------------------------------------------------------------

function curve(trace, spec, axis, i) {
  const key = String(trace.run), name = plain(trace.label), group = `g${i}`;
  const line = {color: colour(trace.main ? 0 : i), width: trace.main ? 2.2 : 1.6, dash: trace.dash || "solid", shape: "linear"};
  const common = {name, legendgroup: group, type: "scatter", hovertemplate: "%{y:.5~g}"};
  if (trace.x) {
    const texts = trace.names && trace.names.map((text) => plain(text));
    const hover = texts ? {text: texts, hovertemplate: "%{y:.5~g} (%{text})"} : {};
    const mode = trace.points ? "lines+markers" : "lines";
    const bars = trace.up ? {error_y: {type: "data", symmetric: false, array: trace.up, arrayminus: trace.down, color: line.color}} : {};
    return [{...common, ...hover, ...bars, mode, x: onAxis(key, trace.x, axis), y: trace.y, line, marker: {size: 6}}];
  }
  const found = series(key, trace.series || trace.of);
  if (!found) return [];
  if (trace.at) {
    const {x, y} = extremes(found), at = new Map(x.map((step, j) => [step, y[j]]));
    const steps = trace.at.filter((step) => at.get(step) != null);
    const marker = {symbol: "x", size: 7, color: css("--bad")};
    return [{...common, mode: "markers", x: onAxis(key, steps, axis), y: steps.map((step) => at.get(step)), marker}];
  }
  const raw = extremes(found), middle = means(found);
  const drawn = {...common, mode: "lines", line, connectgaps: true};
  if (!spec.smooth || !STATE.smoothing || trace.dash) { // a branch is short: it is shown as it was
    return [{...drawn, x: onAxis(key, raw.x, axis), y: scaled(raw.y, spec.scale)}];
  }
  const faint = {...drawn, line: {...line, width: 1}, opacity: 0.28, showlegend: false, hoverinfo: "skip", hovertemplate: null};
  const behind = spec.traces.length > MOST_FAINT ? [] : [{...faint, x: onAxis(key, raw.x, axis), y: scaled(raw.y, spec.scale)}];
  return [
    ...behind,
    {...drawn, x: onAxis(key, middle.x, axis), y: scaled(smooth(middle.y, STATE.smoothing), spec.scale)},
  ];
}

function marked(axis) {
  return Object.entries(MARKS).flatMap(([kind, name]) => {
    const found = DATA.marks.filter((mark) => mark.kind === kind);
    if (!found.length) return [];
    const x = onAxis("0", found.map((mark) => mark.step), axis), at = (i) => plain(found[i].text).slice(0, 200);
    const line = {color: css(`--mark-${kind}`), width: 1.2, dash: kind === "stage" ? "solid" : "dot"};
    return [{
      name, type: "scatter", mode: "lines+markers", yaxis: "y2", showlegend: !PHONE.matches, line, legendgroup: `mark-${kind}`,
      x: x.flatMap((v) => [v, v, null]), y: x.flatMap(() => [0, 1, null]),
      text: x.flatMap((_, i) => [at(i), at(i), ""]), hovertemplate: `${name}: %{text}<extra></extra>`,
      marker: {size: x.flatMap(() => [0, 7, 0]), color: line.color, symbol: "triangle-down"},
    }];
  });
}

function lines(spec, small) {
  const axis = axisFor(spec.traces.map((trace) => String(trace.run)));
  const traces = spec.traces.flatMap((trace, i) => curve(trace, spec, axis, i));
  const levels = (spec.levels || []).filter(() => traces.length);
  const first = levels.length && traces.find((trace) => trace.x.length);
  if (first) {
    const x = levels.map(() => first.x[0]), y = levels.map((level) => level.y);
    traces.push({x, y, mode: "markers", opacity: 0, hoverinfo: "skip", showlegend: false, type: "scatter"}); // in the range
  }
  const shapes = levels.map((level, i) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: level.y, y1: level.y,
    line: {color: css(i % 2 ? "--level1" : "--level0"), width: 1.3, dash: level.dash || "dash"},
  }));
  const annotations = levels.map((level, i) => ({
    text: plain(`${level.label} ${Number(level.y.toPrecision(4))}`), xref: "paper", x: i % 2 ? 1 : 0, y: level.y,
    xanchor: i % 2 ? "right" : "left", yanchor: "bottom", showarrow: false,
    font: {size: 10, color: css(i % 2 ? "--level1" : "--level0")},
  }));
  const many = traces.filter((trace) => trace.showlegend !== false).length;
  const layout = {
    ...base(small), shapes, annotations, hovermode: many > 12 ? "closest" : "x unified",
    xaxis: {
      ...axisStyle(), title: {text: small ? "" : AXES[axis], standoff: 6}, nticks: small ? 4 : 0, exponentformat: "SI",
      rangemode: "nonnegative", hoverformat: axis === "step" ? ",.0f" : ".5~g",
    },
    yaxis: {
      ...axisStyle(), title: {text: small ? "" : plain(spec.unit), standoff: 4}, exponentformat: "power",
      type: spec.log ? "log" : "linear",
    },
  };
  if (spec.smooth && !spec.log) layout.yaxis.range = firstView(traces);
  if (STATE.marks && spec.marks) {
    traces.push(...marked(axis));
    layout.yaxis2 = {overlaying: "y", range: [0, 1], visible: false, fixedrange: true};
  }
  layout.showlegend = !small && (many > 1 || (spec.marks && DATA.marks.length > 0 && !PHONE.matches));
  return {traces, layout};
}

// The y range to begin with, where a few values would flatten all others; a double click shows them.
function firstView(traces) {
  const values = traces.flatMap((trace) => trace.y.filter((v) => v !== null)).sort((a, b) => a - b);
  if (values.length < 200) return undefined;
  const at = (share) => values[Math.floor(share * (values.length - 1))];
  const low = at(0.005), high = at(0.995), room = Math.max(high - low, 1e-12);
  const least = Math.max(values[0], low - room * 0.5), most = Math.min(values.at(-1), high + room * 0.5);
  return values[0] < low - room || values.at(-1) > high + room ? [least - room * 0.05, most + room * 0.05] : undefined;
}

// ---- heat maps --------------------------------------------------------------------------------------------------------

function heat(spec, chosen) {
  const {x: steps, y, z} = spec.choices[chosen], axis = spec.axis ? axisFor(["0"]) : "step";
  const shown = spec.log ? z.map((row) => row.map((v) => (v === null || v <= 0 ? null : Math.log10(v)))) : z;
  const x = spec.even ? steps.map((step) => `${step}`) : onAxis("0", steps, axis);
  const flat = shown.flat().filter((v) => v !== null);
  const low = Math.floor(Math.min(...flat)), high = Math.ceil(Math.max(...flat));
  const ticks = Array.from({length: Math.max(high - low + 1, 1)}, (_, i) => low + i);
  const bar = {thickness: 12, outlinewidth: 0, len: 1};
  if (spec.log && ticks.length < 30) Object.assign(bar, {tickvals: ticks, ticktext: ticks.map((t) => `1e${t}`)});
  const trace = {
    type: "heatmap", x, y: y.map((name) => plain(name)), z: shown, customdata: z, colorscale: "Viridis", colorbar: bar, hoverongaps: false,
    hovertemplate: "%{y}, %{x}: %{customdata:.3~g}<extra></extra>",
  };
  const first = spec.first ? {autorange: "reversed"} : {};
  const layout = {
    ...base(false), hovermode: "closest",
    xaxis: {
      ...axisStyle(), title: {text: spec.xtitle || AXES[axis], standoff: 6}, exponentformat: "SI", showgrid: false,
      type: spec.even ? "category" : "linear",
    },
    yaxis: {...axisStyle(), title: {text: spec.ytitle || ""}, type: "category", automargin: true, showgrid: false, ...first},
  };
  return {traces: [trace], layout};
}

// ---- looks ------------------------------------------------------------------------------------------------------------

const axisStyle = () => ({
  gridcolor: css("--grid"), linecolor: css("--grid"), zeroline: false, tickcolor: css("--grid"), automargin: true,
  tickfont: {color: css("--dim"), size: 11}, showspikes: false,
});

function base(small) {
  const ink = css("--ink"), paper = "rgba(0,0,0,0)";
  return {
    paper_bgcolor: paper, plot_bgcolor: paper, font: {family: css("--font"), size: 12, color: ink},
    margin: small ? {l: 34, r: 10, t: 6, b: 26} : {l: 52, r: 14, t: 8, b: 44}, autosize: true, dragmode: "zoom",
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--grid"), font: {color: ink, size: 12}, namelength: 40},
    legend: {orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: {size: 11}, bgcolor: paper},
    modebar: {bgcolor: paper, color: css("--dim"), activecolor: ink},
  };
}

function figure(div) {
  const spec = DATA.charts[Number(div.dataset.chart)];
  const small = div.closest("figure").classList.contains("small");
  return spec.kind === "heat" ? heat(spec, Number(div.dataset.choice || 0)) : lines(spec, small);
}
