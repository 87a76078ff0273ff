// The gallery and the samples: all text of others is set as text.

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function chooser(label, options, choose) {
  const box = make("label", "", `${label} `), select = make("select");
  options.forEach((text, i) => {
    const option = make("option", "", text);
    option.value = String(i);
    select.append(option);
  });
  select.addEventListener("change", () => choose(Number(select.value)));
  box.append(select);
  return {box, select};
}

const brief = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text) || "(empty)";
const byStep = (answer) => `step ${answer.step.toLocaleString("en")} · ${answer.checkpoint}`;

function gallery(place) {
  const list = make("div", "cards");
  const show = (number) => {
    const prompt = DATA.gallery[number];
    list.replaceChildren(...prompt.outputs.map((output) => {
      const card = make("article", "card"), text = make("pre", "output");
      const end = prompt.suffix === null ? [] : [make("span", "asked", prompt.suffix)];
      text.append(make("span", "asked", prompt.prompt), make("span", "answer", output.text || "—"), ...end);
      card.append(make("h4", "", byStep(output)), text);
      return card;
    }));
  };
  const {box} = chooser("prompt", DATA.gallery.map((prompt) => brief(prompt.prompt, 80)), show);
  place.append(box, list);
  show(0);
}

function fields(pairs) {
  const list = make("dl", "fields");
  for (const [name, text] of pairs) {
    const row = make("div"), value = make("dd");
    value.append(make("pre", "", text));
    row.append(make("dt", "", name), value);
    list.append(row);
  }
  return list;
}

function samples(place) {
  const controls = make("div", "row"), list = make("div", "cards");
  let task = DATA.samples[0], document_ = 0, step = -1;
  const steps = () => [...new Set(task.documents.flatMap((one) => one.answers.map((answer) => answer.step)))].sort((a, b) => a - b);
  const show = () => {
    const chosen = document_ < 0 ? task.documents : [task.documents[document_]];
    list.replaceChildren(...chosen.map((one) => {
      const card = make("article", "card");
      card.append(make("h4", "", one.name), fields(one.fields));
      for (const answer of one.answers) {
        if (step < 0 || answer.step === step) card.append(make("h5", "", byStep(answer)), fields(answer.fields));
      }
      return card;
    }));
  };
  const fill = () => {
    document_ = 0;
    step = -1;
    const documents = ["all", ...task.documents.map((one) => brief(one.name, 60))];
    const by = chooser("document", documents, (i) => { document_ = i - 1; show(); });
    by.select.value = "1";
    const at = steps();
    const when = chooser("checkpoint", ["all", ...at.map((s) => `step ${s.toLocaleString("en")}`)], (i) => { step = i ? at[i - 1] : -1; show(); });
    const what = chooser("task", DATA.samples.map((one) => one.task), (i) => { task = DATA.samples[i]; fill(); });
    what.select.value = String(DATA.samples.indexOf(task));
    controls.replaceChildren(what.box, by.box, when.box);
    show();
  };
  place.append(controls, list);
  fill();
}
