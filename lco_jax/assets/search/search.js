"use strict";

const KINDS = { text: ["Texts", "text"], image: ["Images", "image"], audio: ["Sounds", "sound"], video: ["Clips", "clip"] };
const AT_ONCE = 48; // results that are laid out before "Show more"
const TAIL = 12; // letters of a name that are never cut off: they tell the files of a series apart
const ADDRESS = 8000; // letters of an address; servers refuse long ones
const WAVE = '<svg class="wave" viewBox="0 0 24 24" aria-hidden="true"><path d="M3 10v4m4-8v12m5-15v18m5-15v12m4-8v4"/></svg>';

const $ = (id) => document.getElementById(id);
const number = (x) => x.toLocaleString("en");
const element = (tag, ...properties) => Object.assign(document.createElement(tag), ...properties);
const pen = document.createElement("canvas").getContext("2d"); // measures text
pen.font = "100px system-ui, sans-serif";
const dropped = new Map(); // time -> the file that was searched with then; an address cannot hold it
let about = null; // what the server says of itself
let example = null; // {file} or {like}, with name and picture: what is searched with beside the text
let found = []; // results of the last search
let running = null; // the AbortController of the search under way

function say(sentence, bad = false) {
  $("said").textContent = sentence;
  $("said").classList.toggle("bad", bad);
}

// A name that is cut in its middle where it is too long. Copied, it is whole.
function nameIn(place, name) {
  const letters = Array.from(name);
  const tail = letters.slice(-TAIL).join("");
  const head = element("span", { className: "head", textContent: letters.slice(0, -TAIL).join("") });
  head.style.maxWidth = `calc(100% - ${(pen.measureText(tail).width / 100 + 0.05).toFixed(2)}em)`;
  place.classList.add("name");
  place.replaceChildren(head, tail);
}

// ---- what the server answers

// A response. An Error says in a sentence why there is none.
async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({ error: "The server failed; what it printed says why." }));
  throw new Error(said.error);
}

const ask = async (path, options) => (await reach(path, options)).json();

// A sentence: why the page cannot show a file.
async function whyNot(path) {
  try {
    await reach(path, { headers: { range: "bytes=0-0" } });
    return "This browser cannot show it.";
  } catch (error) {
    return error.message;
  }
}

// ---- the query

const typed = () => $("text").value.trim();
const chosenKind = () => new FormData($("form")).get("kind") ?? "";

function choose(chosen) {
  if (example?.picture?.startsWith("blob:")) URL.revokeObjectURL(example.picture);
  example = chosen;
  $("file").value = "";
  $("chosen").hidden = !chosen;
  $("chosen").replaceChildren();
  if (!chosen) return;
  if (chosen.picture) $("chosen").append(Object.assign(new Image(), { src: chosen.picture, alt: "" }));
  $("chosen").append(element("span"));
  nameIn($("chosen").lastChild, chosen.name);
  $("chosen").setAttribute("aria-label", `Searching with ${chosen.name}; remove it`);
}

function chooseFile(file) {
  const picture = file.type.startsWith("image/") ? URL.createObjectURL(file) : null;
  choose({ file, name: file.name, picture });
}

function take(file) {
  if (!file || !about) return;
  if (file.size > about.most) return say(`${file.name} is larger than ${number(about.most)} bytes.`, true);
  chooseFile(file);
  submit();
}

// ---- the address: text, like and kind, as the server's form has them

// Keep the query in the address, and in the history what an address cannot hold.
function keep() {
  const parts = { text: typed(), like: example?.like, kind: chosenKind() };
  const query = new URLSearchParams(Object.entries(parts).filter(([, value]) => value));
  const isLong = String(query).length > ADDRESS;
  if (isLong) query.delete("text");
  const left = example?.file || isLong ? { name: example?.file?.name ?? "The text", time: Date.now() } : null;
  if (example?.file) dropped.set(left.time, example.file);
  const address = query.size ? `?${query}` : location.pathname;
  const isNew = left || history.state || new URL(address, location).href !== location.href;
  history[isNew ? "pushState" : "replaceState"](left, "", address);
  hint();
}

function hint() {
  const left = history.state && `${history.state.name} is not in the address of this page: give it again after a reload.`;
  $("hint").textContent = left ?? about.hint;
}

// The query of the address: at the beginning, and where the browser goes back or forward.
function restore() {
  const given = new URLSearchParams(location.search);
  const file = history.state && dropped.get(history.state.time);
  $("text").value = given.get("text") ?? "";
  for (const chip of $("kinds").querySelectorAll("input")) chip.checked = chip.value === (given.get("kind") ?? "");
  if (!chosenKind()) $("kinds").querySelector("input").checked = true;
  choose(given.get("like") ? { like: given.get("like"), name: "a result" } : null);
  if (file) chooseFile(file);
  hint();
  if (!history.state || file) return look();
  browse();
  say(`${history.state.name} is not in the address of this page; give it again.`, true);
}

// ---- the search

// What the reader asks for: the address keeps it.
function submit() {
  keep();
  look();
}

function look() {
  return typed() || example ? search() : browse();
}

function browse() {
  running?.abort();
  const some = about.some.filter((result) => !chosenKind() || result.kind === chosenKind());
  say(some.length ? "Some of what is indexed" : "Type a text to search among them.");
  lay(some);
}

async function search() {
  const form = new FormData();
  if (typed()) form.append("text", typed());
  if (example?.file) form.append("file", example.file);
  if (example?.like) form.append("like", example.like);
  if (chosenKind()) form.append("kind", chosenKind());
  running?.abort();
  const mine = (running = new AbortController());
  document.body.classList.add("busy");
  say("Searching …");
  const answer = await ask("search", { method: "POST", body: form, signal: mine.signal }).catch((error) => ({ error }));
  if (running !== mine) return;
  document.body.classList.remove("busy");
  if (answer.error?.name === "AbortError") return;
  if (answer.error) {
    say(answer.error.message, true);
    return lay([]);
  }
  const { results, like, seconds } = answer;
  if (like && like.key === example?.like) choose({ like: like.key, name: like.label, picture: pictureOf(like) });
  const took = `${number(Math.round(1000 * seconds.encode))} ms to embed, ${(1000 * seconds.search).toFixed(1)} ms to search`;
  say(results.length ? `The ${number(results.length)} nearest · ${took}` : "Nothing else of this kind is in the index.");
  lay(results);
  scrollTo({ top: 0 });
}

// ---- the results

function lay(results) {
  found = results;
  document.title = [typed() || example?.name, "Search · lco-jax"].filter(Boolean).join(" · ");
  $("results").replaceChildren();
  show();
}

function show() {
  const shown = $("results").children.length;
  $("results").append(...found.slice(shown, shown + AT_ONCE).map(card));
  $("more").hidden = $("results").children.length >= found.length;
}

const pictureOf = (result) => (["image", "video"].includes(result.files[0]) ? `thumbnail/${result.key}/0` : null);
const note = (sentence) => element("p", { className: "none", textContent: sentence });

function card(result) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(`.${name}`);
  if (result.files.length) part("media").append(...medium(result.files[0], `${result.key}/0`, result.label));
  if (result.text) part("media").append(element("p", { textContent: result.text }));
  if (!part("media").childNodes.length) part("media").append(note("no file of this machine"));
  item.dataset.kind = result.kind;
  nameIn(part("label"), result.label);
  part("label").title = result.label;
  if (result.cosine !== null) part("cosine").textContent = result.cosine.toFixed(3);
  part("cosine").title = "cosine with the query";
  part("like").textContent = "Search with this";
  part("like").setAttribute("aria-label", `Search with ${result.label}`);
  part("like").onclick = () => {
    $("text").value = "";
    choose({ like: result.key, name: result.label, picture: pictureOf(result) });
    submit();
    $("text").focus({ preventScroll: true });
  };
  return item;
}

// The elements that show a file of a result.
function medium(kind, at, label) {
  if (kind === "audio") {
    const wave = document.createElement("template");
    wave.innerHTML = WAVE;
    const sound = element("audio", { preload: "metadata", src: `media/${at}` });
    return [wave.content.firstChild, sound, player(sound, label)];
  }
  const image = Object.assign(new Image(), { loading: "lazy", alt: label });
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 100);
  image.onerror = async () => (image.closest("a") ?? image).replaceWith(note(await whyNot(image.src)));
  image.src = `thumbnail/${at}`;
  if (kind === "video") return clip(at, image, label);
  const link = element("a", { href: `media/${at}`, target: "_blank", rel: "noopener" });
  link.append(image);
  return [link];
}

// A clip: its picture until it plays, and nothing of its file is read until then.
function clip(at, image, label) {
  const video = element("video", { preload: "none", hidden: true, src: `media/${at}` });
  const bar = player(video, label);
  const play = bar.querySelector(".play");
  play.title += ", F fills the screen";
  video.addEventListener("playing", () => {
    video.hidden = false;
    video.previousElementSibling.hidden = true;
  });
  image.onclick = () => play.click();
  video.onclick = () => video.controls || play.click();
  video.ondblclick = () => video.requestFullscreen();
  video.onfullscreenchange = () => (video.controls = document.fullscreenElement === video);
  play.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "f" && !video.hidden) video.requestFullscreen();
  });
  return [image, video, bar];
}

// The controls of a sound or a clip. One of them is a stop of the Tab key: the arrows move the place.
function player(media, label) {
  const bar = $("player").content.firstElementChild.cloneNode(true);
  const [play, place, time] = bar.children;
  const move = (to) => (media.currentTime = Math.max(0, Math.min(to, media.duration)));
  const update = () => {
    play.classList.toggle("on", !media.paused);
    play.setAttribute("aria-label", `${media.paused ? "Play" : "Pause"} ${label}`);
    place.value = media.currentTime / media.duration || 0;
    place.setAttribute("aria-valuetext", clock(media.currentTime));
    time.textContent = clock(media.currentTime || media.duration);
  };
  for (const event of ["loadedmetadata", "play", "pause", "timeupdate"]) media.addEventListener(event, update);
  media.addEventListener("play", () => document.querySelectorAll("audio, video").forEach((other) => other !== media && other.pause()));
  media.onerror = async () => bar.replaceChildren(note(await whyNot(media.src)));
  play.title = "Space plays and pauses, ← and → move";
  play.onclick = () => (media.paused ? media.play().catch(() => {}) : media.pause()); // onerror says why it does not play
  play.onkeydown = (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !media.duration) return;
    event.preventDefault();
    move(media.currentTime + (way * media.duration) / 10);
  };
  place.setAttribute("aria-label", `Place in ${label}`);
  place.oninput = () => media.duration && move(place.value * media.duration);
  update();
  return bar;
}

function clock(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

// ---- the page

function chip(kind, name, count, checked) {
  const label = document.createElement("label");
  const input = element("input", { type: "radio", name: "kind", value: kind, checked, onchange: submit });
  label.append(input, `${name} `, element("small", { textContent: number(count) }));
  return label;
}

async function begin() {
  about = await ask("about");
  const counts = Object.entries(about.counts);
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  const media = about.modalities.filter((kind) => kind !== "text");
  const words = new Intl.ListFormat("en", { type: "disjunction" }).format(media.map((kind) => KINDS[kind][1]));
  $("about").textContent = [`${number(total)} indexed`, about.model, about.stored].filter(Boolean).join(" · ");
  about.hint = words ? `Or drop, paste or pick an example (${words}), alone or with words.` : "";
  document.querySelector(".pick").hidden = !words;
  $("file").accept = media.map((kind) => `${kind}/*`).join();
  $("kinds").hidden = counts.length < 2;
  $("kinds").append(chip("", "All", total, true));
  for (const [kind, count] of counts) $("kinds").append(chip(kind, KINDS[kind][0], count, false));
  const early = $("text").value;
  restore();
  $("text").value ||= early;
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (!about) return;
  if (typed() || example) submit();
  else say("Type a text, or drop an image, a sound or a clip.", true);
};
$("file").onchange = () => take($("file").files[0]);
$("chosen").onclick = () => {
  choose(null);
  $("text").focus();
};
$("more").onclick = show;
addEventListener("popstate", () => about && restore());
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
