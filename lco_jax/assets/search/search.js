"use strict";

const KINDS = { text: ["Texts", "text"], image: ["Images", "image"], audio: ["Sounds", "sound"], video: ["Clips", "clip"] };
const AT_ONCE = 48; // results that are laid out before "Show more"
const WAVE = '<svg class="wave" viewBox="0 0 24 24" aria-hidden="true"><path d="M3 10v4m4-8v12m5-15v18m5-15v12m4-8v4"/></svg>';

const $ = (id) => document.getElementById(id);
const number = (x) => x.toLocaleString("en");
let about = null; // what the server says of itself
let example = null; // {file} or {like}, with name and picture: what is searched with beside the text
let found = []; // results of the last search
let running = null; // the AbortController of the search under way

function say(sentence, bad = false) {
  $("said").textContent = sentence;
  $("said").classList.toggle("bad", bad);
}

// ---- the query

function choose(chosen) {
  if (example?.picture?.startsWith("blob:")) URL.revokeObjectURL(example.picture);
  example = chosen;
  $("file").value = "";
  $("chosen").hidden = !chosen;
  $("chosen").replaceChildren();
  if (!chosen) return;
  if (chosen.picture) $("chosen").append(Object.assign(new Image(), { src: chosen.picture, alt: "" }));
  $("chosen").append(Object.assign(document.createElement("span"), { textContent: chosen.name }));
  $("chosen").setAttribute("aria-label", `Searching with ${chosen.name}; remove it`);
}

function take(file) {
  if (!file) return;
  if (file.size > about?.most) return say(`${file.name} is larger than ${number(about.most)} bytes.`, true);
  const picture = file.type.startsWith("image/") ? URL.createObjectURL(file) : null;
  choose({ file, name: file.name, picture });
  search();
}

async function ask(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({ error: "The server failed; what it printed says why." }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function search() {
  const text = $("text").value.trim();
  if (!text && !example) return say("Type a text, or drop an image, a sound or a clip.", true);
  const form = new FormData();
  if (text) form.append("text", text);
  if (example?.file) form.append("file", example.file);
  if (example?.like) form.append("like", example.like);
  const kind = new FormData($("form")).get("kind");
  if (kind) form.append("kind", kind);
  running?.abort();
  const mine = (running = new AbortController());
  document.body.classList.add("busy");
  say("Searching …");
  try {
    const { results, seconds } = await ask("search", { method: "POST", body: form, signal: mine.signal });
    found = results;
    const took = `${number(Math.round(1000 * seconds.encode))} ms to embed, ${(1000 * seconds.search).toFixed(1)} ms to search`;
    say(found.length ? `The ${number(found.length)} nearest · ${took}` : "Nothing else of this kind is in the index.");
    $("results").replaceChildren();
    show();
    scrollTo({ top: 0 });
  } catch (error) {
    if (error.name === "AbortError") return;
    found = [];
    $("results").replaceChildren();
    show();
    say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);
  } finally {
    if (running === mine) document.body.classList.remove("busy");
  }
}

// ---- the results

function show() {
  const shown = $("results").children.length;
  $("results").append(...found.slice(shown, shown + AT_ONCE).map(card));
  $("more").hidden = $("results").children.length >= found.length;
}

function card(result) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(`.${name}`);
  part("media").append(...(result.files.length ? medium(result.files[0], `${result.key}/0`, result.label) : []));
  if (result.text) part("media").append(Object.assign(document.createElement("p"), { textContent: result.text }));
  if (!part("media").childNodes.length) {
    part("media").append(Object.assign(document.createElement("p"), { className: "none", textContent: "no file of this machine" }));
  }
  item.dataset.kind = result.kind;
  part("label").textContent = part("label").title = result.label;
  if (result.cosine !== null) part("cosine").textContent = result.cosine.toFixed(3);
  part("cosine").title = "cosine with the query";
  part("like").textContent = "Search with this";
  part("like").setAttribute("aria-label", `Search with ${result.label}`);
  part("like").onclick = () => {
    const picture = result.files[0] === "image" ? `thumbnail/${result.key}/0` : null;
    $("text").value = "";
    choose({ like: result.key, name: result.label, picture });
    search();
    $("text").focus({ preventScroll: true });
  };
  return item;
}

function medium(kind, at, label) {
  const gone = (event) => event.target.replaceWith(Object.assign(document.createElement("p"), {
    className: "none", textContent: "The file has changed or is gone, or this browser cannot show it.",
  }));
  if (kind === "image") {
    const image = Object.assign(new Image(), { loading: "lazy", alt: label, onerror: gone });
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 100);
    image.src = `thumbnail/${at}`;
    const link = Object.assign(document.createElement("a"), { href: `media/${at}`, target: "_blank", rel: "noopener" });
    link.append(image);
    return [link];
  }
  const player = Object.assign(document.createElement(kind), { controls: true, preload: "metadata", onerror: gone });
  player.setAttribute("aria-label", label);
  player.src = `media/${at}`;
  player.onplay = () => document.querySelectorAll("audio, video").forEach((other) => other !== player && other.pause());
  if (kind === "video") return [player];
  const wave = document.createElement("template");
  wave.innerHTML = WAVE;
  return [wave.content.firstChild, player];
}

// ---- the page

function chip(kind, name, count, checked) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "kind", value: kind, checked });
  input.onchange = () => ($("text").value.trim() || example) && search();
  label.append(input, `${name} `, Object.assign(document.createElement("small"), { textContent: number(count) }));
  return label;
}

async function begin() {
  about = await ask("about");
  const counts = Object.entries(about.counts);
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  const hears = about.modalities.filter((kind) => kind !== "text").map((kind) => KINDS[kind][1]);
  $("about").textContent = `${number(total)} indexed · ${about.model}`;
  const words = new Intl.ListFormat("en", { type: "disjunction" }).format(hears);
  $("hint").textContent = words ? `Or drop, paste or pick an example (${words}), alone or with words.` : "";
  document.querySelector(".pick").hidden = !words;
  $("file").accept = about.modalities.filter((kind) => kind !== "text").map((kind) => `${kind}/*`).join();
  $("kinds").hidden = counts.length < 2;
  $("kinds").append(chip("", "All", total, true));
  for (const [kind, count] of counts) $("kinds").append(chip(kind, KINDS[kind][0], count, false));
  if (!found.length && !running) {
    found = about.some;
    say("Some of what is indexed");
    show();
  }
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  search();
};
$("file").onchange = () => take($("file").files[0]);
$("chosen").onclick = () => {
  choose(null);
  $("text").focus();
};
$("more").onclick = show;
addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input")) {
    event.preventDefault();
    $("text").focus();
  }
});
addEventListener("paste", (event) => take(event.clipboardData.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  if (event.dataTransfer.types.includes("Files")) $("drop").hidden = false;
});
addEventListener("dragleave", (event) => ($("drop").hidden = !event.relatedTarget || $("drop").hidden));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  take(event.dataTransfer.files[0]);
});
begin().catch((error) => say(`The page cannot begin: ${error.message}`, true));
