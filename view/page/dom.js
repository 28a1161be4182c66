// Elements, requests and jobs. Names come from files: they only ever become text, never markup.

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function labelled(text, field, note) {
  return make("label", {}, text, field, note ? make("span", { class: "note" }, note) : null);
}

export function select(options, onchange) {
  const node = make("select", { onchange: onchange ?? (() => {}) });
  setOptions(node, options);
  return node;
}

// options: [[value, text], …]; what was chosen stays chosen where it can
export function setOptions(node, options) {
  const before = node.value;
  node.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => String(value) === before)) node.value = before;
}

export function problem(text) {
  return make("p", { class: "problem", role: "alert" }, text);
}

export function empty(text) {
  return make("p", { class: "empty" }, text);
}

export function inputs(number) {
  return number === 1 ? "1 input was" : `${count(number)} inputs were`;
}

export const count = (number) => Number(number).toLocaleString("en");

export function short(number) {
  if (number === null || number === undefined) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(2);
  return String(Number(number.toPrecision(4)));
}

// The answer of this page's server; an Error with its sentence where it refuses.
export async function ask(path, body) {
  const how = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, how);
  } catch {
    throw new Error("dit-view does not answer; is it still running in its terminal?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.sentence);
  return answer;
}

const FINISHED = new Set(["done", "stopped", "failed"]);

// Start a job and tell `seen` of every state of it, the last one too.
export async function follow(path, body, seen) {
  let job = await ask(path, body);
  for (;;) {
    seen(job);
    if (FINISHED.has(job.state)) return job;
    await new Promise((resolve) => setTimeout(resolve, 200));
    job = await ask(`jobs/${job.id}`);
  }
}

// A button that starts a job, one that stops it, and how far it is.
export class JobControl {
  constructor(word, start) {
    this.job = null;
    this.go = make("button", { class: "main", type: "button", onclick: () => this.run(start) }, word);
    this.halt = make("button", { type: "button", disabled: true, onclick: () => this.stop() }, "Stop");
    this.buttons = make("div", { class: "buttons" }, this.go, this.halt);
    this.words = make("span", { "data-role": "words", "aria-live": "polite" });
    this.bar = make("progress", { max: 1, value: 0 });
    this.status = make("div", { class: "status", hidden: true }, this.words, this.bar);
  }

  // Whether all is known that a start needs.
  ready(is) {
    this.unready = !is;
    this.go.disabled = this.unready || Boolean(this.running);
  }

  async run(start) {
    if (this.go.disabled) return;
    this.running = true;
    this.go.disabled = true;
    this.status.hidden = false;
    this.show("asking …", 0);
    this.problem?.remove();
    try {
      await start((job) => this.saw(job));
    } catch (error) {
      this.fail(error.message);
    } finally {
      this.running = false;
      this.go.disabled = Boolean(this.unready);
      this.halt.disabled = true;
      this.job = null;
    }
    if (this.wanted) {
      this.wanted = false;
      await this.run(start);
    }
  }

  // Start, in place of what runs.
  restart() {
    if (!this.running) return this.go.click();
    this.wanted = true;
    return this.stop();
  }

  saw(job) {
    this.job = job;
    this.halt.disabled = FINISHED.has(job.state);
    const before = { 0: "beginning …", 1: "1 job has its turn before" }[job.before] ?? `${job.before} jobs have their turn before`;
    const words = { waiting: before, running: job.sentence, done: "finished", stopped: "stopped; what was made so far stays" };
    if (job.state === "failed") this.fail(job.sentence);
    else this.show(words[job.state], job.share);
  }

  show(words, share) {
    this.bar.hidden = false;
    this.words.textContent = words;
    this.bar.value = share;
  }

  fail(sentence) {
    this.show("", 0);
    this.bar.hidden = true;
    this.problem?.remove();
    this.problem = problem(sentence);
    this.status.append(this.problem);
  }

  async stop() {
    if (!this.job) return;
    this.halt.disabled = true;
    this.words.textContent = "stopping after this step …";
    await ask(`jobs/${this.job.id}/stop`, {}).catch(() => {});
  }
}

// An image that changes to another one only when that has arrived; `failed` is told the sentence where it does not.
export function swap(image, address, failed = () => {}) {
  const next = new Image();
  next.onload = () => {
    image.src = address;
    image.hidden = false;
  };
  next.onerror = () => ask(address).catch((error) => failed(error.message));
  next.src = address;
}
