// What the page does: unpacks plotly.js, draws what comes into view, and redraws on a change of axis, smoothing or theme.

const drawn = new Set();

function draw(div) {
  const {traces, layout} = figure(div);
  drawn.add(div);
  document.documentElement.dataset.drawn ||= performance.now().toFixed(0); // ms from the start to the first chart
  return Plotly.react(div, traces, {...layout, uirevision: `${STATE.axis} ${div.dataset.choice || 0} ${div.dataset.log || ""}`}, CONFIG);
}

function redraw() {
  remember();
  drawn.forEach(draw);
}

function addControls(div) {
  const spec = DATA.charts[Number(div.dataset.chart)], head = div.closest("figure").querySelector("figcaption");
  if (spec.kind === "heat" && spec.choices.length > 1) {
    const {box} = chooser("", spec.choices.map((choice) => choice.label), (i) => { div.dataset.choice = String(i); draw(div); });
    head.append(box);
  } else if (spec.kind === "heat") {
    head.append(make("p", "", spec.choices[0].label));
  } else if (!div.closest("figure").classList.contains("small")) {
    const button = make("button", "log", spec.log ? "linear" : "log");
    button.type = "button";
    button.title = "scale of the y axis";
    button.addEventListener("click", () => {
      spec.log = !spec.log;
      div.dataset.log = String(spec.log);
      button.textContent = spec.log ? "linear" : "log";
      draw(div);
    });
    head.append(button);
  }
}

async function unpack() {
  const packed = atob(document.getElementById("page-plotly").textContent.trim());
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// ---- theme ------------------------------------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];
const chosenTheme = () => { try { return localStorage.getItem("k2jax-theme"); } catch { return null; } };

function setTheme(name, keep) {
  const button = document.getElementById("theme");
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  button.textContent = PHONE.matches ? name : `theme: ${name}`;
  button.dataset.now = name;
  if (keep) { try { localStorage.setItem("k2jax-theme", name); } catch { /* a file's page may have no storage */ } }
  if (window.Plotly) redraw();
}

// ---- a training beside it -----------------------------------------------------------------------------------------------

function reloads() {
  if (!DATA.reload_s) return;
  const label = make("label", "check"), box = make("input");
  box.type = "checkbox";
  box.checked = STATE.reload;
  box.addEventListener("change", () => { STATE.reload = box.checked; remember(); });
  label.append(box, ` reload every ${DATA.reload_s} s`);
  document.querySelector(".controls").append(label);
  setInterval(() => { if (STATE.reload) location.reload(); }, DATA.reload_s * 1000);
}

// ---- printing ---------------------------------------------------------------------------------------------------------

let before = null;

function printing() {
  before = document.getElementById("theme").dataset.now;
  document.body.classList.add("printing");
  document.documentElement.dataset.theme = "light";
  if (window.Plotly) document.querySelectorAll(".plot").forEach(draw);
}

function printed() {
  document.body.classList.remove("printing");
  setTheme(before || "system", false);
}

// ---- begin ------------------------------------------------------------------------------------------------------------

async function begin() {
  setTheme(THEMES.includes(chosenTheme()) ? chosenTheme() : "system", false);
  document.getElementById("theme").addEventListener("click", (event) => {
    setTheme(THEMES[(THEMES.indexOf(event.target.dataset.now) + 1) % THEMES.length], true);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (window.Plotly) redraw(); });
  document.getElementById("axis").value = STATE.axis;
  document.getElementById("marks").checked = STATE.marks;
  document.getElementById("smoothing").value = STATE.smoothing;
  document.getElementById("smoothed").textContent = STATE.smoothing.toFixed(2);
  reloads();
  document.getElementById("axis").addEventListener("change", (event) => { STATE.axis = event.target.value; redraw(); });
  document.getElementById("marks").addEventListener("change", (event) => { STATE.marks = event.target.checked; redraw(); });
  document.getElementById("smoothing").addEventListener("input", (event) => {
    STATE.smoothing = Number(event.target.value);
    document.getElementById("smoothed").textContent = STATE.smoothing.toFixed(2);
    requestAnimationFrame(redraw);
  });
  const places = {gallery, samples};
  document.querySelectorAll("[data-browser]").forEach((place) => places[place.dataset.browser](place));
  const plots = document.querySelectorAll(".plot");
  plots.forEach(addControls);
  if (!window.DecompressionStream) {
    plots.forEach((div) => { div.textContent = "Charts need a browser of 2023 or later."; });
    return;
  }
  await unpack();
  const seen = new IntersectionObserver((entries) => {
    for (const {isIntersecting, target} of entries) {
      if (isIntersecting && !drawn.has(target)) { seen.unobserve(target); draw(target); }
    }
  }, {rootMargin: "300px"});
  plots.forEach((div) => seen.observe(div));
  addEventListener("beforeprint", printing);
  addEventListener("afterprint", printed);
  document.documentElement.dataset.ready = "yes";
}

begin();
