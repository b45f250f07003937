// Where the figures come from: a stream of events; when that fails, a question each second; and word when nobody answers.

const POLL_MS = 1000;
const TIMEOUT_MS = 3000;
const SILENCE_MS = 4000;
const STREAM_AGAIN_MS = 10000;

export async function get(path) {
  let response;
  try {
    response = await fetch(path, {
      headers: { Accept: "application/json" },
      cache: "no-store",
      credentials: "same-origin",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch {
    throw new Error("The server does not answer");
  }
  if (!response.ok) throw new Error(`The server answers with an error (HTTP ${response.status})`);
  return response.json();
}

// connected(): a server answers, for the first time or again. message(content, way): one second's figures, by "stream"
// or "polling". silent(problem): nobody answers; called again each second.
export function follow({ connected, message, silent }) {
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

  function openStream() {
    let waiting = Promise.resolve();
    stream = new EventSource("api/v1/stream");
    stream.addEventListener("message", (event) => {
      watch();
      const content = JSON.parse(event.data);
      waiting = waiting.then(() => stream && take(content, "stream")).catch(closeStream);
    });
    stream.addEventListener("error", closeStream);
    watch();
  }

  function watch() {
    clearTimeout(watchdog);
    watchdog = setTimeout(closeStream, SILENCE_MS);
  }

  function closeStream() {
    if (!stream) return;
    clearTimeout(watchdog);
    stream.close();
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
      silent(error.message);
    }
    setTimeout(poll, POLL_MS);
  }

  openStream();
}
