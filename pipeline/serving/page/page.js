"use strict";
// Shows what the model of this server says of a picture; asks the endpoints beside this page and nothing else.

const at = (id) => document.getElementById(id);
const show = (id, shown = true) => { at(id).hidden = !shown; };
const DARK = 0.74; // of what a word did not look at

let token = sessionStorage.getItem("token") || "";
let model = null; // what GET /model says
let picture = null; // the file that is shown
let current = new AbortController(); // of all that is asked about it
let maps = null; // {words, maps} of the caption
let merges = null; // [rows][columns] of numbers

// ---- the server ----

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) askForToken();
  const { detail } = await response.json().catch(() => ({}));
  if (response.status === 429 || response.status === 503) throw new Error("The server is busy. Try again in a moment.");
  throw new Error(detail ? sentence(detail) : `The server answered with code ${response.status}.`);
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function form(fields) {
  const data = new FormData();
  data.append("image", picture, "picture");
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return { method: "POST", body: data, signal: current.signal };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s)));
      yield { name: lines.event || "message", ...JSON.parse(lines.data) };
    }
  }
}

// ---- beginning ----

async function begin() {
  try {
    for (;;) {
      const health = await fetch("health").then((answer) => answer.json(), () => ({ status: "away" }));
      if (health.status === "ready") break;
      const words = { loading: "The model is being loaded …", ending: "The server is ending." };
      at("model").textContent = words[health.status] || "The server can't be reached.";
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    model = await (await call("model")).json();
  } catch (error) {
    at("model").textContent = error.message;
    return;
  }
  const { caption, answer, search, merges: merging } = model.abilities;
  at("model").textContent = model.name;
  document.title = `${model.name} · OpenFLM`;
  show("entry", false);
  show("desk", caption || answer || merging);
  show("caption-part", caption);
  show("ask", answer);
  show("merges-part", merging);
  show("search", search);
  if (search) watchIndex();
}

function askForToken() {
  token = "";
  sessionStorage.removeItem("token");
  show("entry");
  show("desk", false);
  show("search", false);
  at("token").focus();
}

at("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  sessionStorage.setItem("token", token);
  at("token").value = "";
  begin();
});

// ---- a picture ----

async function take(file, name = "the picture") {
  if (!file || !model) return;
  current.abort();
  current = new AbortController();
  clear();
  URL.revokeObjectURL(at("image").src);
  at("image").src = URL.createObjectURL(file);
  at("image").alt = `Chosen: ${file.name || name}`;
  show("invitation", false);
  show("picture");
  show("another");
  at("stage").classList.add("has-picture");
  try {
    picture = file;
    await at("image").decode().catch(() => { throw new Error("This file is no picture that a browser can show."); });
    at("picture").style.setProperty("--ratio", at("image").naturalWidth / at("image").naturalHeight);
    if (file.size > model.max_bytes) picture = await smaller(file);
    for (const button of [at("merges"), ...at("ask").querySelectorAll("button")]) button.disabled = false;
    if (model.abilities.caption) await caption();
  } catch (error) {
    complain(error);
  }
}

async function smaller(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 });
}

function clear() {
  picture = maps = merges = null;
  for (const id of ["caption", "spoken", "merged", "answers"]) at(id).textContent = "";
  for (const button of [at("merges"), ...at("ask").querySelectorAll("button")]) button.disabled = true;
  at("merges").setAttribute("aria-pressed", "false");
  at("caption").classList.remove("writing");
  show("error", false);
  show("hint", false);
  hideOverlay();
}

function complain(error) {
  if (error.name === "AbortError") return;
  at("caption").classList.remove("writing");
  at("error").textContent = error.message;
  show("error");
}

async function caption() {
  const line = at("caption"), signal = current.signal;
  line.classList.add("writing");
  for await (const event of events(await call("caption?stream=true", form({})))) {
    if (signal.aborted) return;
    if (event.name === "error") throw new Error(sentence(event.detail));
    line.textContent = event.caption;
  }
  line.classList.remove("writing");
  at("spoken").textContent = line.textContent || "The model wrote nothing.";
  if (!line.textContent) line.textContent = "(nothing)";
  else if (model.abilities.attention) await wordMaps(line.textContent);
}

async function wordMaps(text) {
  const signal = current.signal;
  const found = await (await call("attention", form({ text }))).json();
  if (signal.aborted || !found.words.length) return;
  maps = found;
  const line = at("caption");
  let rest = text;
  line.replaceChildren();
  found.words.forEach((word, number) => {
    const place = rest.indexOf(word);
    if (place < 0) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word;
    button.dataset.number = number;
    button.setAttribute("aria-label", `${word}: show where it looked`);
    for (const kind of ["pointerenter", "focus", "click"]) button.addEventListener(kind, () => lightWord(number));
    for (const kind of ["pointerleave", "blur"]) button.addEventListener(kind, hideOverlay);
    line.append(rest.slice(0, place), button);
    rest = rest.slice(place + word.length);
  });
  line.append(rest);
  show("hint");
}

// ---- over the picture: the model sees its centre square ----

function square() {
  const image = at("image"), canvas = at("overlay"), scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(image.clientWidth * scale);
  canvas.height = Math.round(image.clientHeight * scale);
  const side = Math.min(canvas.width, canvas.height);
  return { context: canvas.getContext("2d"), canvas, side, left: (canvas.width - side) / 2, top: (canvas.height - side) / 2 };
}

function lightWord(number) {
  at("merges").setAttribute("aria-pressed", "false");
  const map = maps.maps[number], values = map.flat(), most = Math.max(...values), least = Math.min(...values);
  const small = new OffscreenCanvas(map[0].length, map.length), pixels = small.getContext("2d");
  const shades = pixels.createImageData(small.width, small.height);
  values.forEach((value, place) => {
    const share = most > least ? (value - least) / (most - least) : 1;
    shades.data[4 * place + 3] = Math.round(255 * DARK * (1 - share));
  });
  pixels.putImageData(shades, 0, 0);
  const { context, canvas, side, left, top } = square();
  context.fillStyle = `rgba(0, 0, 0, ${DARK})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.clearRect(left, top, side, side);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, left, top, side, side);
  canvas.classList.add("shown");
  at("caption").querySelectorAll("button").forEach((one) => one.classList.toggle("lit", one.dataset.number === String(number)));
}

function drawMerges() {
  const { context, canvas, side, left, top } = square(), rows = merges.length, columns = merges[0].length;
  const height = side / rows, width = side / columns, members = new Map();
  for (const number of merges.flat()) members.set(number, (members.get(number) || 0) + 1);
  const cell = (row, column) => (merges[row] || [])[column];
  context.lineWidth = Math.max(1, canvas.width / 500);
  context.strokeStyle = "rgba(255, 255, 255, .85)";
  context.beginPath();
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const number = cell(row, column), x = left + column * width, y = top + row * height;
      if (members.get(number) > 1) {
        context.fillStyle = `hsl(${(number * 137.508) % 360} 75% 55% / .5)`;
        context.fillRect(x, y, width + 0.5, height + 0.5);
      }
      if (cell(row, column + 1) !== number && column + 1 < columns) line(context, x + width, y, x + width, y + height);
      if (cell(row + 1, column) !== number && row + 1 < rows) line(context, x, y + height, x + width, y + height);
    }
  }
  context.stroke();
  canvas.classList.add("shown");
  at("merged").textContent = `${rows * columns} patches became ${members.size}`;
}

function line(context, x, y, toX, toY) {
  context.moveTo(x, y);
  context.lineTo(toX, toY);
}

function hideOverlay() {
  if (at("merges").getAttribute("aria-pressed") === "true") return;
  at("overlay").classList.remove("shown");
  at("caption").querySelectorAll("button").forEach((one) => one.classList.remove("lit"));
}

at("merges").addEventListener("click", async () => {
  const pressed = at("merges").getAttribute("aria-pressed") !== "true";
  at("merges").setAttribute("aria-pressed", String(pressed));
  at("merged").textContent = "";
  if (!pressed) return hideOverlay();
  try {
    merges = merges || (await (await call("merges", form({}))).json()).merges;
    drawMerges();
  } catch (error) {
    at("merges").setAttribute("aria-pressed", "false");
    complain(error);
  }
});

new ResizeObserver(() => {
  if (at("merges").getAttribute("aria-pressed") === "true" && merges) drawMerges();
  else hideOverlay();
}).observe(at("image"));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideOverlay(); });

// ---- questions ----

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("question").value.trim(), button = at("ask").querySelector("button");
  if (!picture || !question) return;
  button.disabled = true;
  show("error", false);
  try {
    const [best] = (await (await call("answer", form({ question }))).json()).answers;
    const asked = document.createElement("dt"), answered = document.createElement("dd");
    asked.textContent = question;
    answered.textContent = best.answer;
    if (best.probability !== null) {
      const share = document.createElement("small");
      share.textContent = `${Math.round(100 * best.probability)} %`;
      answered.append(share);
    }
    const pair = document.createElement("div");
    pair.append(asked, answered);
    at("answers").prepend(pair);
    at("question").select();
  } catch (error) {
    complain(error);
  }
  button.disabled = !picture;
});

// ---- the folder ----

async function watchIndex() {
  for (;;) {
    let status;
    try {
      status = await (await call("search/status")).json();
    } catch {
      return;
    }
    const { total, indexed, refused, done } = status;
    at("progress").value = total ? (indexed + refused) / total : 0;
    show("progress", !done);
    const left = refused ? `, ${refused} files are no usable pictures` : "";
    at("indexed").textContent = total === null ? "Looking for pictures …"
      : done ? `${indexed} pictures${left}` : `${indexed} of ${total} pictures indexed`;
    if (done) return;
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

at("search-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = at("search-form").querySelector("button"), text = at("sentence").value.trim();
  if (!text) return;
  button.disabled = true;
  show("error", false);
  try {
    const body = JSON.stringify({ text, top: 24 });
    const answer = await call("search", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    showResults((await answer.json()).results);
  } catch (error) {
    complain(error);
  }
  button.disabled = false;
});

function showResults(results) {
  at("results").querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  at("results").replaceChildren(...results.map(({ number, name }) => {
    const item = document.createElement("li"), button = document.createElement("button"), image = new Image();
    button.type = "button";
    button.title = image.alt = name;
    button.append(image);
    item.append(button);
    call(`search/pictures/${number}`).then((found) => found.blob())
      .then((blob) => { image.src = URL.createObjectURL(blob); }).catch(() => item.remove());
    button.addEventListener("click", async () => {
      try {
        const found = await call(`search/pictures/${number}?size=large`);
        document.body.scrollIntoView({ block: "start" });
        await take(await found.blob(), name);
      } catch (error) {
        complain(error);
      }
    });
    return item;
  }));
  if (!results.length) at("results").textContent = "Nothing is indexed yet.";
}

// ---- ways in ----

at("choose").addEventListener("click", () => at("file").click());
at("replace").addEventListener("click", () => at("file").click());
at("photograph").addEventListener("click", () => at("camera").click());
for (const id of ["file", "camera"]) {
  at(id).addEventListener("change", () => { take(at(id).files[0]); at(id).value = ""; });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) take(file, "pasted");
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); at("stage").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); at("stage").classList.remove("over"); });
}
document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));

begin();
