"use strict";

const $ = (id) => document.getElementById(id);
const page = { server: null, known: "", before: null, rates: [], timer: 0, key: "", stop: null };
const MOST_TEXTS = 24; // of which a picture can be read
const MOST_LABELS = 8;

// --- the server ---

class Refusal extends Error {}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (page.key) headers.Authorization = `Bearer ${page.key}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) openKey();
  throw refusal(await answer.json().catch(() => ({})), `The server answers with status ${answer.status}.`);
}

// OpenAI's routes have an object in "error", all others a text beside which the hint is.
function refusal(said, otherwise) {
  const error = typeof said.error === "object" && said.error ? said.error : { message: said.error, hint: said.hint };
  const message = error.message ?? otherwise;
  return new Refusal(error.hint ? `${message} (${error.hint})` : message);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  const broken = new Refusal("The answer broke off. Is the server still running?");
  for (;;) {
    const { done, value } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : broken; });
    if (done) throw broken; // what is whole ends with [DONE]
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data:") ? part.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw refusal(event, "The answer broke off.");
      yield event;
    }
  }
}

// --- elements: text of others only ever becomes text ---

function make(tag, options = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // screen readers read again what is written again
}

function bars(rows) {
  const most = Math.max(1, ...rows.map((row) => row.score));
  return make("ol", { class: "bars" }, ...rows.map((row) => {
    const fill = make("div", { class: "fill" });
    fill.style.width = `${(100 * Math.max(0, row.score)) / most}%`;
    const name = make("p", {}, make("span", { text: row.name }), " ", make("span", { text: row.score.toFixed(3) }));
    return make("li", {}, name, make("div", { class: "track", "aria-hidden": "true" }, fill));
  }));
}

const linesOf = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(2)} s`;
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const named = (id) => $(id).value || page.server.model;
const canOf = (id) => ($(id).value ? page.server.adapters.find((one) => one.name === $(id).value)?.can ?? [] : page.server.can);

function explain(error, id) {
  say(id, error instanceof Refusal ? error.message : `This page failed: ${error.message}`);
  if (!(error instanceof Refusal)) console.error(error);
}

// `job` asks, shows what it finds and gives the sentence about it.
function onSubmit(task, doing, job) {
  let busy = false;
  $(`form-${task}`).addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy || !page.server) return; // disabled buttons would lose the focus
    busy = true;
    say(`error-${task}`, "");
    say(`note-${task}`, doing);
    const since = performance.now();
    try {
      say(`note-${task}`, `${await job()} in ${seconds(since)}.`);
    } catch (error) {
      say(`note-${task}`, "");
      explain(error, `error-${task}`);
    }
    busy = false;
  });
}

// --- generate ---

async function follow(side, name, signal) {
  const chat = $("form-generate").elements.form.value === "chat", prompt = $("prompt").value, since = performance.now();
  const body = {
    model: name, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    ...($("seed").value === "" ? {} : { seed: Number($("seed").value) }),
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const text = $(`text-${side}`), card = text.parentElement;
  let tokens = 0, how = "", begun = !chat;
  if (!chat) text.append(make("span", { class: "given", text: prompt }));
  card.classList.add("running");
  try {
    for await (const event of events(await ask(chat ? "v1/chat/completions" : "v1/completions", body, signal))) {
      const choice = event.choices?.[0];
      const piece = choice?.text ?? choice?.delta?.content ?? "";
      text.append(begun ? piece : piece.trimStart());
      begun ||= piece.trim() !== "";
      how = choice?.finish_reason ?? how;
      tokens = event.usage?.completion_tokens ?? tokens;
    }
    const ended = how === "length" ? "ended by max tokens" : "ended by itself";
    say(`note-${side}`, `${count(tokens, "token")} in ${seconds(since)}, ${ended}`);
  } catch (error) {
    if (error.name === "AbortError") say(`note-${side}`, "stopped");
    else explain(error, `error-${side}`);
  } finally {
    card.classList.remove("running");
  }
}

function clearSides() {
  const sides = $("right").value === "-" ? ["left"] : ["left", "right"];
  $("card-right").hidden = sides.length < 2;
  for (const side of sides) {
    say(`name-${side}`, named(side));
    for (const part of ["text", "note", "error"]) say(`${part}-${side}`, "");
  }
  return sides;
}

onSubmit("generate", "Answering …", async () => {
  const sides = clearSides();
  page.stop = new AbortController();
  $("stop").disabled = false;
  await Promise.all(sides.map((side) => follow(side, named(side), page.stop.signal)));
  const stopped = page.stop.signal.aborted;
  $("stop").disabled = true;
  return stopped ? "Stopped" : count(sides.length, "answer");
});
$("stop").addEventListener("click", () => {
  $("form-generate").querySelector("[type=submit]").focus(); // before this one is disabled
  page.stop.abort();
});
for (const side of ["left", "right"]) $(side).addEventListener("change", () => { if ($("stop").disabled) clearSides(); });

// --- embed ---

function cell(value) {
  const made = make("td", { text: value.toFixed(2) });
  made.style.background = `rgba(var(${value < 0 ? "--cold" : "--warm"}), ${(0.7 * Math.min(1, Math.abs(value))).toFixed(3)})`;
  return made;
}

function heat(texts, vectors) {
  const unit = vectors.map((one) => { const size = Math.hypot(...one) || 1; return one.map((value) => value / size); });
  const dot = (one, other) => one.reduce((sum, value, at) => sum + value * other[at], 0);
  const heads = texts.map((_, at) => make("th", { scope: "col", text: at + 1 }));
  const rows = unit.map((one, at) => make("tr", {}, make("th", { scope: "row", text: `${at + 1}. ${texts[at]}` }), ...unit.map((other) => cell(dot(one, other)))));
  return make("table", { class: "heat" },
    make("caption", { class: "note", text: "Cosine similarity of each two texts" }),
    make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "Text" }), ...heads)), make("tbody", {}, ...rows));
}

onSubmit("embed", "Embedding …", async () => {
  const texts = linesOf("texts");
  if (texts.length > MOST_TEXTS) throw new Refusal(`${texts.length} texts are too many for a picture; give ${MOST_TEXTS} or fewer`);
  const found = await (await ask("v1/embeddings", { model: named("by-embed"), input: texts })).json();
  const vectors = found.data.map((one) => one.embedding);
  const card = make("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": "Similarities" }, heat(texts, vectors));
  $("out-embed").replaceChildren(card);
  return `${count(texts.length, "vector")} of ${count(vectors[0].length, "number")}`;
});

// --- classify ---

function hue(label) {
  let sum = 7;
  for (const sign of label) sum = (sum * 131 + sign.codePointAt(0)) % 360;
  return sum;
}

function highlighted(text, entities) {
  const signs = Array.from(text), made = make("p", { class: "entities" }); // offsets count characters, not UTF-16
  let at = 0;
  for (const one of entities) {
    const mark = make("mark", {}, signs.slice(one.start, one.end).join(""), " ", make("small", { text: `${one.entity_group} ${one.score.toFixed(2)}` }));
    mark.style.setProperty("--hue", hue(one.entity_group));
    made.append(signs.slice(at, one.start).join(""), mark);
    at = one.end;
  }
  made.append(signs.slice(at).join(""));
  return made;
}

function labelled(text, labels) {
  const shown = labels.slice(0, MOST_LABELS), left = labels.length - shown.length;
  const rest = left ? [make("p", { class: "note", text: `and ${count(left, "label")} below` })] : [];
  return [make("h3", { text }), bars(shown.map((one) => ({ name: one.label, score: one.score }))), ...rest];
}

onSubmit("classify", "Classifying …", async () => {
  const texts = linesOf("lines"), adapter = $("by-classify").value;
  const ofTokens = canOf("by-classify").includes("entities");
  const found = ofTokens
    ? await (await ask("classify_batch", { inputs: texts, ...(adapter ? { parameters: { adapter_id: adapter } } : {}) })).json()
    : await (await ask("tei/predict", { model: named("by-classify"), inputs: texts.map((one) => [one]) })).json();
  $("out-classify").replaceChildren(...texts.map((text, at) => make("div", { class: "card" },
    ...(ofTokens ? [highlighted(text, found[at])] : labelled(text, found[at])))));
  const marked = ofTokens ? `${count(found.flat().length, "entity", "entities")} in ` : "";
  return `${marked}${count(texts.length, "text")}`;
});

// --- rerank ---

onSubmit("rerank", "Ranking …", async () => {
  const documents = linesOf("documents");
  const found = await (await ask("v1/rerank", { model: named("by-rerank"), query: $("query").value, documents })).json();
  const rows = found.results.map((one, at) => ({ name: `${at + 1}. ${documents[one.index]}`, score: one.relevance_score }));
  $("out-rerank").replaceChildren(make("div", { class: "card" }, bars(rows)));
  return count(documents.length, "document");
});

// --- what the server can do, and does ---

const LACKING = {
  generate: (server) => `${server.model} is ${article(server.model_type)} ${server.model_type} model, which does not generate text.`,
  embed: (server) => `${server.model} makes no vectors.`,
  classify: () => "Nothing that is loaded classifies: neither the base nor an adapter has a head of labels.",
  rerank: () => "Nothing that is loaded ranks: neither the base nor an adapter has a head of one label.",
};
const WANTED = { generate: ["generate"], embed: ["embed"], classify: ["labels", "entities"], rerank: ["rerank"] };
const article = (word) => (/^[aeiou]/.test(word) ? "an" : "a");

function fill(id, options, first) {
  const kept = $(id).options.length ? $(id).value : first;
  $(id).replaceChildren(...options.map(([value, text]) => make("option", { value, text })));
  if (options.some(([value]) => value === kept)) $(id).value = kept;
}

function offer(server) {
  for (const [task, wanted] of Object.entries(WANTED)) {
    const able = (one) => wanted.some((each) => one.can.includes(each));
    const adapters = server.adapters.filter(able).map((one) => [one.name, one.name]);
    const options = [...(able(server) ? [["", `base: ${server.model}`]] : []), ...adapters];
    if (task === "generate") {
      fill("left", options);
      fill("right", [["-", "nobody else"], ...options], adapters[0]?.[0]);
    } else {
      // One that was trained for just this; a head of one label is for ranking.
      const own = server.adapters.find((one) => able(one) && (task === "rerank" || one.can.length === 1));
      fill(`by-${task}`, options, own?.name);
    }
    const why = options.length ? "" : LACKING[task](server);
    const form = $(`form-${task}`), was = form.firstElementChild.disabled;
    form.firstElementChild.disabled = Boolean(why);
    if (why || was) say(`note-${task}`, why);
    $(`out-${task}`).hidden = Boolean(why);
  }
  const chat = $("form-generate").elements.form[1];
  chat.disabled = !server.chat;
  chat.parentElement.title = server.chat ? "" : "This model has no chat template.";
  if (!page.known && server.chat) chat.checked = true;
  clearSides();
}

function listAdapters(server) {
  const rows = server.adapters.map((one) => make("tr", {}, make("th", { scope: "row", text: one.name }), make("td", { text: one.kind }),
    make("td", { text: one.can.join(", ") }), make("td", { text: `${(one.nbytes / 1e6).toFixed(1)} MB` }), make("td", { text: one.where })));
  $("live-adapters").replaceChildren(...(rows.length ? rows : [make("tr", {}, make("td", { colspan: 5, text: "None is loaded." }))]));
}

function showNumbers(server) {
  const now = performance.now(), before = page.before;
  const rate = (name) => (before ? Math.round(Math.max(0, (1000 * (server[name] - before.server[name])) / (now - before.at))) : 0);
  const answered = rate("decode_tokens"), cache = server.pages ? `${((100 * server.pages_used) / server.pages).toFixed(1)} %` : "none";
  say("live-running", server.running.toLocaleString("en"));
  say("live-waiting", server.waiting.toLocaleString("en"));
  say("live-rate", answered.toLocaleString("en"));
  say("live-reading", rate("prompt_tokens").toLocaleString("en"));
  say("live-cache", cache);
  say("live-pages", server.pages ? `of the KV cache, ${server.pages_used} of ${count(server.pages, "page")}` : "KV cache");
  say("pulse", `${count(server.running + server.waiting, "request")} · ${answered.toLocaleString("en")} tokens/s`);
  page.rates = [...page.rates, answered].slice(-61);
  const most = Math.max(1, ...page.rates);
  const points = page.rates.map((one, at) => `${at + 61 - page.rates.length},${(19 - (18 * one) / most).toFixed(2)}`);
  $("live-line").firstElementChild.setAttribute("points", points.join(" "));
  say("live-peak", `at most ${most === 1 ? Math.max(...page.rates) : most.toLocaleString("en")}`);
  page.before = { at: now, server };
}

async function refresh() {
  try {
    const server = await (await ask("stats")).json(), first = page.server === null;
    page.server = server;
    const known = JSON.stringify([server.can, server.chat, server.adapters]);
    if (known !== page.known) {
      offer(server);
      listAdapters(server);
      page.known = known;
    }
    say("about", `${server.model} · ${server.model_type} · ${server.dtype} on ${server.device} · ${count(server.adapters.length, "adapter")}`);
    showNumbers(server);
    if (first && !$("panel-generate").hidden && $("form-generate").firstElementChild.disabled) choose($("tab-embed"));
  } catch (error) {
    explain(error, "about");
  }
}

async function poll() {
  clearTimeout(page.timer);
  if (!document.hidden) await refresh();
  clearTimeout(page.timer);
  // Without a key that is accepted, asking again is no use.
  if (!$("key-dialog").open) page.timer = setTimeout(poll, 1000);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });

// --- tabs and the key ---

const tabs = [...document.querySelectorAll("[role=tab]")];
function choose(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
}
for (const [at, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    choose(next);
    next.focus();
  });
}

function openKey() {
  if ($("key-dialog").open) return;
  clearTimeout(page.timer);
  say("key-why", `${page.key ? "The server does not accept the key that was given. " : ""}It is kept until this page is closed, and sent to this server alone.`);
  $("key").value = "";
  $("key-dialog").returnValue = "cancel"; // what Escape leaves
  $("key-dialog").showModal();
}
$("key-open").addEventListener("click", openKey);
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue === "use") page.key = $("key").value.trim();
  if ($("key-dialog").returnValue === "use" || page.server) poll();
  $("key").value = "";
});
poll();
