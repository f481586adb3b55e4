// A chat with the alias. The page keeps the conversation; each answer keeps its feedback token for the thumbs.
const byId = (id) => document.getElementById(id);
const turns = byId("turns");
const random = () => [...crypto.getRandomValues(new Uint8Array(8))].map((n) => n.toString(16).padStart(2, "0")).join("");
const rater = (localStorage.rater ??= "console-" + random());
let messages = [];
let conversation = random();
let running = null;

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function addTurn(role, text) {
  turns.querySelector(".empty")?.remove();
  const turn = make("div", "turn " + role);
  const body = make("div", "body", text);
  turn.append(body);
  turns.append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, body };
}

// The data of each server-sent event, as it arrives.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

async function explain(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || answer.statusText;
  }
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(text) {
  addTurn("user", text);
  messages.push({ role: "user", content: text });
  const { turn, body } = addTurn("assistant", "");
  turn.classList.add("waiting");
  running = new AbortController();
  const system = byId("system").value.trim();
  const started = performance.now();
  try {
    const answer = await post("/playground/chat", {
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      conversation_id: conversation,
      rater,
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value),
    }, running.signal);
    if (!answer.ok) throw new Error(await explain(answer));
    let model = "";
    let isWhole = false;
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      model = chunk.model ?? model;
      body.textContent += chunk.choices?.[0]?.delta?.content ?? "";
      turn.scrollIntoView({ block: "end" });
    }
    if (!isWhole) throw new Error("the answer broke off");
    messages.push({ role: "assistant", content: body.textContent });
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    addThumbs(turn, answer.headers.get("X-Thumbwheel-Feedback-Token"), `${model} · ${seconds} s`);
  } catch (error) {
    messages.pop(); // the question was not answered: it is not part of the conversation
    if (!body.textContent) body.remove();
    turn.append(make("p", "error", error.name === "AbortError" ? "stopped" : error.message));
  } finally {
    turn.classList.remove("waiting");
    running = null;
  }
}

function addThumbs(turn, token, note) {
  const row = make("div", "row");
  if (token) {
    let given = null;
    const buttons = ["up", "down"].map((value) => {
      const button = make("button", "thumb " + value);
      button.append(Object.assign(new Image(16, 16), { src: "/static/thumb.svg", alt: "thumb " + value }));
      button.type = "button";
      button.title = "thumb " + value;
      button.onclick = async () => {
        const wanted = given === value ? "retract" : value; // a second click takes it back
        const answer = await post("/playground/feedback", { value: wanted, token }).catch((error) => error);
        if (!answer.ok) {
          row.append(make("span", "error", answer.text ? await explain(answer) : answer.message));
          return;
        }
        given = wanted === "retract" ? null : value;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button && given !== null));
      };
      return button;
    });
    row.append(...buttons);
  }
  row.append(make("small", "muted", note));
  turn.append(row);
  turn.scrollIntoView({ block: "end" });
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || running) return;
  byId("text").value = "";
  ask(text);
});

byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});

byId("fresh").addEventListener("click", () => {
  running?.abort();
  messages = [];
  conversation = random();
  turns.replaceChildren(make("p", "empty", "Ask something."));
  byId("text").focus();
});
