// Players that keep step, curves with a cursor, all from the JSON in the page. No server, no other files but videos.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const shown = new Set(data.methods.map((method) => method.name));
const STEP_S = 0.08;  // how far a player may run from the leader before it is called back
let players = [], seeking = false;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const leader = () => players.reduce((best, player) => (  // the longest: shorter ones wait at their end
  player.error || !player.readyState || best?.duration >= player.duration ? best : player), undefined);
const duration = () => Math.max(0, ...players.map((player) => player.duration || 0));
const methods = () => data.methods.filter((method) => shown.has(method.name));

function layPlayers() {
  const time = players.length ? now() : 0, playing = players.some((player) => !player.paused);
  players = [];
  at("players").replaceChildren(...methods().map((method) => {
    const video = data.videos[method.name]?.[at("prompt").value];
    const figure = make("figure");
    figure.style.setProperty("--colour", method.colour);
    const name = make("figcaption", {}, make("span", {textContent: method.name}));
    if (!video) {
      figure.append(make("div", {className: "missing", textContent: "no video"}), name);
      return figure;
    }
    const player = make("video", {src: video.file, muted: true, playsInline: true, preload: "auto"});
    player.playbackRate = Number(at("rate").value);
    player.addEventListener("loadedmetadata", () => { player.currentTime = Math.min(time, player.duration); range(); });
    player.addEventListener("error", () => {
      figure.replaceChildren(make("div", {className: "missing", textContent: "cannot be played"}), name);
    });
    player.addEventListener("click", toggle);
    name.append(make("output"));
    players.push(player);
    player.figure = figure;
    player.method = method.name;
    figure.append(player, name);
    if (playing) player.play();
    return figure;
  }));
  layCurves();
}

function now() { return leader()?.currentTime ?? 0; }
function range() { at("seek").max = duration(); }

function toggle() {
  const first = leader();
  if (!first) return;
  if (first.paused) {
    if (first.ended) seek(0);
    for (const player of players) if (!player.ended) player.play().catch(() => {});
  } else for (const player of players) player.pause();
}

function seek(time) {
  for (const player of players) if (player.readyState > 0) player.currentTime = Math.min(time, player.duration);
  at("seek").value = time;
}

function keepStep() {
  const first = leader();
  if (first) {
    for (const player of players) {
      if (player === first || player.readyState < 2 || player.seeking) continue;
      const target = Math.min(first.currentTime, player.duration);
      if (Math.abs(player.currentTime - target) > STEP_S) player.currentTime = target;
      else if (player.paused && !first.paused && target < player.duration - STEP_S) player.play().catch(() => {});
    }
    if (!seeking) at("seek").value = first.currentTime;
    at("clock").textContent = `${first.currentTime.toFixed(1)} / ${duration().toFixed(1)} s`;
    at("play").textContent = first.paused ? "Play" : "Pause";
    for (const line of document.querySelectorAll("line.now")) {
      const x = line.scale(first.currentTime);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    const metric = at("metric").value, second = Math.floor(first.currentTime);
    for (const player of players) {
      const value = metric && curveOf(player.method, metric)?.mean[second];
      player.figure.querySelector("output").textContent = value == null ? "" : value.toPrecision(3);
    }
  }
  requestAnimationFrame(keepStep);
}

function curveOf(method, metric) {
  return at("whose").value === "mean" ? data.means[metric]?.[method]
    : data.videos[method]?.[at("prompt").value]?.curves[metric];
}

function layCurves() {
  const chosen = at("metric").value;
  const metrics = at("every").checked ? data.metrics : data.metrics.filter((metric) => metric === chosen);
  at("curves").replaceChildren(...metrics.map(plot));
}

// The seconds of which something is known, cut where one is missing; h0 after a stretch shows one that is alone.
function stretches(values) {
  const parts = [];
  values.forEach((value, i) => {
    if (value == null) return;
    if (i && values[i - 1] != null) parts.at(-1).push(i); else parts.push([i]);
  });
  return parts;
}

function plot(metric) {
  const width = 460, height = 190, left = 46, bottom = 22, top = 8;
  const lines = methods().map((method) => [method, curveOf(method.name, metric)]).filter(([, curve]) => curve);
  const known = lines.flatMap(([, curve]) => [...curve.mean, ...(curve.low ?? []), ...(curve.high ?? [])])
    .filter((value) => value != null);
  const end = Math.max(1, ...lines.map(([, curve]) => curve.mean.length));
  const least = Math.min(...known), most = Math.max(...known), flat = least === most;
  const low = flat ? least - 0.5 : least, high = flat ? most + 0.5 : most, span = high - low;
  const x = (time) => left + (width - left - 6) * time / end;
  const y = (value) => height - bottom - (height - bottom - top) * (value - low) / span;
  const point = (second, value) => `${x(second + 0.5).toFixed(1)} ${y(value).toFixed(1)}`;
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${metric} over time`});
  for (const value of !known.length ? [] : flat ? [least] : [low, (low + high) / 2, high]) {
    svg.append(draw("line", {class: "axis", x1: left, x2: width - 6, y1: y(value), y2: y(value)}));
    svg.append(draw("text", {x: left - 4, y: y(value) + 4, "text-anchor": "end"}, value.toPrecision(3)));
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(draw("text", {x: x(part * end), y: height - 6, "text-anchor": "middle"}, `${+(part * end).toFixed(1)} s`));
  }
  for (const [method, curve] of lines) {
    for (const part of curve.low ? stretches(curve.low) : []) {
      const edge = [...part.map((i) => point(i, curve.low[i])), ...part.reverse().map((i) => point(i, curve.high[i]))];
      svg.append(draw("polygon", {class: "band", points: edge.join(" "), fill: method.colour}));
    }
    const d = stretches(curve.mean).map((part) => `M${part.map((i) => point(i, curve.mean[i])).join("L")}h0`).join("");
    const line = draw("path", {d, stroke: method.colour});
    line.append(draw("title", {}, method.name));
    svg.append(line);
  }
  const cursor = draw("line", {class: "now", x1: x(0), x2: x(0), y1: top, y2: height - bottom});
  cursor.scale = x;
  svg.append(cursor);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const time = ((event.clientX - box.left) * width / box.width - left) * end / (width - left - 6);
    seek(Math.min(end, Math.max(0, time)));
  });
  return make("figure", {}, make("figcaption", {textContent: metric}), svg);
}

function begin() {
  data.prompts.forEach((prompt, index) => at("prompt").append(make("option", {value: index, textContent: prompt})));
  data.metrics.forEach((metric) => at("metric").append(make("option", {value: metric, textContent: metric})));
  for (const method of data.methods) {
    const box = make("input", {type: "checkbox", checked: true, value: method.name});
    box.addEventListener("change", () => {
      if (box.checked) shown.add(method.name); else shown.delete(method.name);
      layPlayers();
    });
    const label = make("label", {}, box, ` ${method.name}`);
    label.style.setProperty("--colour", method.colour);
    at("methods").append(label);
  }
  at("play").addEventListener("click", toggle);
  at("rate").addEventListener("change", () => players.forEach((p) => { p.playbackRate = Number(at("rate").value); }));
  at("seek").addEventListener("input", () => { seeking = true; seek(Number(at("seek").value)); });
  at("seek").addEventListener("change", () => { seeking = false; });
  at("prompt").addEventListener("change", layPlayers);
  for (const id of ["metric", "whose", "every"]) at(id).addEventListener("change", layCurves);
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT", "BUTTON", "TEXTAREA"].includes(event.target.tagName)) return;
    if (event.key === " ") { event.preventDefault(); toggle(); }
    if (event.key === "ArrowLeft") seek(Math.max(0, now() - 1));
    if (event.key === "ArrowRight") seek(Math.min(duration(), now() + 1));
  });
  layPlayers();
  keepStep();
}

begin();
