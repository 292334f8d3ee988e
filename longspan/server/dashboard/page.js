// Shows what /dashboard/events tells. Nothing here knows more of the engine than one picture has.

const KEY = "longspan-key";
const RETRY_MS = 2000;
const STALE_MS = 4000;
const RATE_S = 2; // rates are means over this time
const LEAST_S = 60, MOST_S = 300; // what charts show
const HUES = 8, PATTERNS = 3;
const MOST_REQUESTS = 50;
const MOST_BESIDE = 5; // ranks that have room beside the requests, and places that are told one by one
const MEDIAN_OF = 9;

const $ = (id) => document.getElementById(id);

function make(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

/** Children for these items: those that are there by their keys, others made. In this order. */
function keep(parent, items, keyOf, makeOne) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const key = String(keyOf(item));
    const child = known.get(key) ?? makeOne(item);
    child.dataset.key = key;
    return child;
  });
  const same = wanted.length === parent.children.length
    && wanted.every((child, index) => child === parent.children[index]);
  if (!same) parent.replaceChildren(...wanted);
  return wanted;
}

// Numbers as people read them.

const whole = (number) => Math.round(number).toLocaleString("en");
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;

function seconds(value) {
  if (value < 0.0995) return `${(1e3 * value).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(1e3 * value)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  const rounded = Math.round(value);
  if (rounded < 100) return `${rounded} s`;
  return `${Math.floor(rounded / 60)}:${String(rounded % 60).padStart(2, "0")} min`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let power = 0;
  while (value >= 999.5 && power < units.length - 1) { value /= 1000; power += 1; }
  return `${value.toFixed(power && value < 99.5 ? 1 : 0)} ${units[power]}`;
}

// A request's number, which is its colour: the least that no other running request has.

let numbers = new Map();

function giveNumbers(requests) {
  const kept = new Map();
  for (const { id } of requests) if (numbers.has(id)) kept.set(id, numbers.get(id));
  const taken = new Set(kept.values());
  let next = 1;
  for (const { id } of requests) {
    if (kept.has(id)) continue;
    while (taken.has(next)) next += 1;
    taken.add(next);
    kept.set(id, next);
  }
  numbers = kept;
}

function colour(id) {
  const index = numbers.get(id) - 1;
  return `hue-${index % HUES} pattern-${Math.floor(index / HUES) % PATTERNS}`;
}

// Ranks: pools that fill from below.

function showRanks(picture) {
  const columns = keep($("ranks"), [...picture.ranks.keys()], (rank) => rank, (rank) => {
    const column = make("div", "rank");
    const pool = make("div", "pool");
    pool.setAttribute("role", "img");
    column.append(pool, make("h3", "", `Rank ${rank}`), make("p", "pages"), make("p", "kept"));
    return column;
  });
  $("middle").classList.toggle("wide", columns.length > MOST_BESIDE);
  picture.ranks.forEach((view, rank) => showRank(columns[rank], view, rank, picture.requests));
}

function showRank(column, view, rank, requests) {
  const holders = requests.filter(({ pages }) => pages[rank]);
  // Pages that several requests share count for each: in the pool they are divided among them.
  const held = holders.reduce((sum, { pages }) => sum + pages[rank], 0);
  const share = held > view.used ? view.used / held : 1;
  const parts = holders.map(({ id, pages }) => [id, pages[rank] * share]);
  const free = view.total - view.used - view.cached;
  parts.push(["cached", view.cached], ["free", free + Math.max(view.used - held, 0)]);
  const [pool, , pages, kept] = column.children;
  const segments = keep(pool, parts, ([id]) => id, ([id]) => make("div", ""));
  parts.forEach(([id, size], index) => {
    const segment = segments[index];
    const number = numbers.get(id);
    segment.className = number ? colour(id) : `rest ${id}`;
    segment.style.flexGrow = size;
    segment.textContent = number && size * pool.clientHeight > 13 * view.total ? number : "";
    segment.title = `${number ? `request ${number}` : id}: ${plural(size, "page")}`;
  });
  const names = holders.map((one) => `request ${numbers.get(one.id)} ${one.pages[rank]}`);
  pool.setAttribute("aria-label", [
    `Rank ${rank}: ${view.used} of ${plural(view.total, "page")} in use, ${view.cached} cached`,
    ...names,
  ].join("; "));
  pages.textContent = `${whole(view.used)} / ${whole(view.total)}`;
  kept.textContent = `${whole(view.cached)} cached`;
}

// Requests: how far they are, and where their keys lie.

function makeRequest({ id }) {
  const row = make("li", "request");
  const bar = make("div", "bar");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", `prefill of request ${numbers.get(id)}`);
  bar.append(make("i", ""));
  const facts = make("div", "facts");
  facts.append(make("span", ""), make("span", ""));
  const badge = make("span", "", numbers.get(id));
  badge.className = `badge ${colour(id)}`;
  const name = make("span", "id", id);
  name.title = id;
  row.append(badge, name, make("span", "strategy"), bar, facts, make("div", "places"));
  return row;
}

function showRequests(picture) {
  const shown = picture.requests.slice(0, MOST_REQUESTS);
  const rows = keep($("requests"), shown, ({ id }) => id, makeRequest);
  shown.forEach((request, index) => showRequest(rows[index], request));
  $("idle").hidden = shown.length > 0;
  $("more").hidden = shown.length === picture.requests.length;
  $("more").textContent = `and ${whole(picture.requests.length - shown.length)} more`;
}

function showRequest(row, request) {
  const [, , strategy, bar, facts, places] = row.children;
  const share = Math.floor(100 * request.prefilled_tokens / request.prompt_tokens);
  bar.setAttribute("aria-valuenow", share);
  bar.firstChild.className = colour(request.id);
  bar.firstChild.style.width = `${share}%`;
  strategy.textContent = request.strategy ?? "–";
  strategy.title = "how its ranks share attention in this step";
  const left = request.seconds_left === null ? "" : `, ${seconds(request.seconds_left)} left`;
  const cached = request.cached_tokens ? `, ${whole(request.cached_tokens)} cached` : "";
  facts.firstChild.textContent = request.state === "prefill"
    ? `prefill ${whole(request.prefilled_tokens)} of ${whole(request.prompt_tokens)} tokens${cached}${left}`
    : `${request.state}: ${plural(request.output_tokens, "token")} after ${whole(request.prompt_tokens)}${cached}`;
  const first = request.time_to_first_token;
  facts.lastChild.textContent = first === null ? "" : `first token after ${seconds(first)}`;
  places.textContent = placesOf(request);
}

function placesOf({ pages, home }) {
  const held = pages.map((count, rank) => [count, rank]).filter(([count]) => count);
  if (held.length > MOST_BESIDE) {
    const sum = held.reduce((total, [count]) => total + count, 0);
    return `${plural(sum, "page")} on ${held.length} ranks, home ${home}`;
  }
  return held.map(([count, rank]) =>
    `rank ${rank}${rank === home ? " (home)" : ""}: ${plural(count, "page")}`).join(" · ");
}

// Charts over the last minutes.

/** A line through points of time and value, and single `dots`; `name` says what the last point is. */
function showChart(id, name, line, dots, format, now) {
  const chart = $(id);
  const points = [...line, ...dots];
  const oldest = Math.min(now, ...points.map(([at]) => at));
  const begin = now - Math.min(Math.max(now - oldest, LEAST_S), MOST_S);
  const most = nice(Math.max(...points.map(([, value]) => value), 0));
  const place = ([at, value]) =>
    `${(300 * (at - begin) / (now - begin)).toFixed(1)} ${(100 - 96 * value / most).toFixed(1)}`;
  if (!chart.firstChild) {
    chart.innerHTML = '<p class="now"></p><p class="axis"><span></span></p>'
      + '<svg viewBox="0 0 300 100" preserveAspectRatio="none" role="img">'
      + '<path class="grid" d="M0 4H300M0 52H300"/><path class="dots"/><path class="line"/></svg>'
      + '<p class="axis"><span></span><span>now</span></p>';
  }
  const [latest, top, drawing, bottom] = chart.children;
  const told = `${line.length ? format(line.at(-1)[1]) : "–"} ${name}`;
  latest.textContent = told;
  top.firstChild.textContent = line.length ? format(most) : "";
  bottom.firstChild.textContent = `−${seconds(now - begin)}`;
  drawing.setAttribute("aria-label", `last ${seconds(now - begin)}; now ${told}`);
  const [, marks, path] = drawing.children;
  marks.setAttribute("d", dots.map((point) => `M${place(point)}h0`).join(""));
  path.setAttribute("d", line.length ? `M${line.map(place).join("L")}` : "");
}

/** The least of 1, 2, 5, 10, 20, ... that is not below a value. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= value * 0.999);
}

/** At each point the median of it and those before. */
function medians(points) {
  return points.map(([at], index) => {
    const values = points.slice(Math.max(index - MEDIAN_OF + 1, 0), index + 1).map(([, value]) => value);
    return [at, values.sort((one, other) => one - other)[values.length >> 1]];
  });
}

// What is known from earlier pictures.

let pictures = []; // of the last RATE_S
let history = { generated: [], prefilled: [], first: [], each: [] };

function forget() {
  pictures = [];
  history = { generated: [], prefilled: [], first: [], each: [] };
}

function rateOf(count) {
  const [first, last] = [pictures[0], pictures.at(-1)];
  return last.now > first.now ? (count(last) - count(first)) / (last.now - first.now) : null;
}

function remember(picture) {
  pictures = [...pictures.filter(({ now }) => now >= picture.now - RATE_S), picture];
  const add = (points, at, value) => { if (value !== null) points.push([at, value]); };
  add(history.generated, picture.now, rateOf((one) => one.generated_tokens));
  add(history.prefilled, picture.now, rateOf((one) => one.prefilled_tokens));
  for (const ended of picture.ended) {
    add(history.first, ended.at, ended.time_to_first_token);
    add(history.each, ended.at, ended.time_per_output_token);
  }
  for (const points of Object.values(history)) {
    while (points.length && points[0][0] < picture.now - MOST_S) points.shift();
  }
}

function showFigures(picture) {
  const sum = (part) => picture.ranks.reduce((total, view) => total + view[part], 0);
  $("model").textContent = picture.model;
  $("running").textContent = whole(picture.requests.length);
  $("waiting").textContent = whole(picture.waiting);
  for (const name of ["generated", "prefilled"]) {
    $(name).textContent = history[name].length ? whole(history[name].at(-1)[1]) : "–";
  }
  $("usage").textContent = `${Math.round(100 * sum("used") / Math.max(sum("total"), 1))} %`;
}

function showCharts({ now }) {
  for (const name of ["generated", "prefilled"]) {
    showChart(`${name}-chart`, "tokens/s", history[name], [], whole, now);
  }
  for (const name of ["first", "each"]) {
    const points = history[name];
    showChart(`${name}-chart`, `median of ${MEDIAN_OF}`, medians(points), points, seconds, now);
  }
}

function showSent({ sent_bytes: sent }) {
  const names = Object.keys(sent).filter((name) => sent[name]).sort((one, other) => sent[other] - sent[one]);
  const most = Math.max(...names.map((name) => sent[name]), 1);
  const rows = keep($("sent"), names, (name) => name, (name) => {
    const row = make("li", "sent");
    const bar = make("div", "bar");
    bar.append(make("i", ""));
    row.append(make("b", "", name), bar, make("span", "amount"));
    return row;
  });
  names.forEach((name, index) => {
    const [, bar, amount] = rows[index].children;
    const rate = rateOf((one) => one.sent_bytes[name] ?? 0) ?? 0;
    bar.firstChild.style.width = `${100 * sent[name] / most}%`;
    amount.textContent = `${bytes(sent[name])}, now ${bytes(rate)}/s`;
  });
  $("nothing-sent").hidden = names.length > 0;
}

function show(picture) {
  document.querySelector("main").hidden = false;
  remember(picture);
  giveNumbers(picture.requests);
  picture.requests.sort((one, other) => numbers.get(one.id) - numbers.get(other.id));
  showFigures(picture);
  showRanks(picture);
  showRequests(picture);
  showCharts(picture);
  showSent(picture);
}

// The connection. EventSource can't send a header; so the events are read with fetch.

let heard = 0;

function tell(state, text) {
  const status = $("status");
  if (status.textContent === text) return;
  status.dataset.state = state;
  status.textContent = text;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

async function listen() {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const answer = await fetch("dashboard/events", { headers, cache: "no-store" });
  if (answer.status === 401) {
    await askForKey(key !== null);
    return listen();
  }
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  forget();
  for await (const { engine, ...server } of events(answer)) {
    heard = Date.now();
    tell(server.error ? "error" : "live", server.error ?? "live");
    show({ ...engine, ...server });
  }
}

function askForKey(refused) {
  const form = $("key-form");
  tell("waiting", "needs a key");
  $("key-refused").textContent = refused ? "That is not the key." : "";
  form.hidden = false;
  $("key").focus();
  return new Promise((resolve) => {
    form.onsubmit = (submitted) => {
      submitted.preventDefault();
      sessionStorage.setItem(KEY, $("key").value);
      $("key").value = "";
      form.hidden = true;
      resolve();
    };
  });
}

setInterval(() => {
  if (heard && Date.now() - heard > STALE_MS) {
    tell("waiting", `no news for ${Math.round((Date.now() - heard) / 1000)} s`);
  }
}, 1000);

for (;;) {
  try {
    await listen();
  } catch (error) {
    console.warn(error);
  }
  if (!heard) tell("error", "no connection to the server");
  await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
}
