// Where the figures come from: a stream of events; when that fails, a question each second; and word when nobody answers.

import { KeyNeeded, ask, checkAnswer, headers } from "./key.js";

const POLL_MS = 1000;
const TIMEOUT_MS = 3000;
const SILENCE_MS = 4000;
const STREAM_AGAIN_MS = 10000;

export async function get(path) {
  let response;
  try {
    response = await fetch(path, {
      headers: headers({ Accept: "application/json" }),
      cache: "no-store",
      credentials: "same-origin",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch {
    throw new Error("The server does not answer");
  }
  checkAnswer(response);
  if (!response.ok) throw new Error(`The server answers with an error (HTTP ${response.status})`);
  return response.json();
}

// The data of each event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice("data: ".length));
  }
}

// connected(): a server answers, for the first time or again. message(content, way): one second's figures, by "stream"
// or "polling". silent(problem): nobody answers; called again each second. locked(problem): it asks for a key.
export function follow({ connected, message, silent, locked }) {
  let answering = false;
  let stream = null;
  let watchdog = 0;
  let streamFailedAt = -Infinity;

  async function take(content, way) {
    if (!answering) {
      await connected();
      answering = true;
    }
    await message(content, way);
  }

  // By fetch, for an EventSource cannot send a key.
  async function openStream() {
    const mine = new AbortController();
    stream = mine;
    watch();
    try {
      const response = await fetch("api/v1/stream", {
        headers: headers({ Accept: "text/event-stream" }),
        cache: "no-store",
        credentials: "same-origin",
        signal: mine.signal,
      });
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      for await (const content of events(response.body)) {
        if (stream !== mine) return;
        watch();
        await take(content, "stream");
      }
    } catch {
      // Polling finds out what is wrong, and says it.
    }
    if (stream === mine) closeStream();
  }

  function watch() {
    clearTimeout(watchdog);
    watchdog = setTimeout(closeStream, SILENCE_MS);
  }

  function closeStream() {
    if (!stream) return;
    clearTimeout(watchdog);
    stream.abort();
    stream = null;
    streamFailedAt = performance.now();
    poll();
  }

  async function poll() {
    const wasAnswering = answering;
    try {
      await take(await get("api/v1/live"), "polling");
      if (!wasAnswering || performance.now() - streamFailedAt > STREAM_AGAIN_MS) {
        openStream();
        return;
      }
    } catch (error) {
      answering = false;
      if (error instanceof KeyNeeded) {
        locked(error.message);
        await ask(error.message);
        openStream();
        return;
      }
      silent(error.message);
    }
    setTimeout(poll, POLL_MS);
  }

  openStream();
}
