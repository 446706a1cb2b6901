// Talking to the server: JSON requests, and answers that come as server-sent events.

/** What the server refused, or a connection that failed (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null, broken = false } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
    this.broken = broken; // the answer had begun
  }
}

const KEY = "minimax-m1/api-key";

/** The API key lives as long as the tab; it is never written to disk by this page. */
export const apiKey = {
  value: null, // for browsers whose storage is switched off
  get() {
    try {
      this.value ??= sessionStorage.getItem(KEY);
    } catch {
      // then it lives as long as the page
    }
    return this.value ?? "";
  },
  set(value) {
    this.value = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // as above
    }
  },
};

/** Fetch a path of the server with the key; raise ApiError for everything but success. */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not our envelope, a proxy's page perhaps
  }
  const after = Number(response.headers.get("retry-after"));
  return new ApiError(message || `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    retryAfter: after > 0 ? Math.ceil(after) : null,
  });
}

/**
 * Send a chat request; yield its chunks as they come.
 *
 * Raises ApiError: refused, an error in mid-stream, or a stream that ends without its `[DONE]`.
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { status: response.status, broken: true });
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke.", { broken: true });
  }
  throw new ApiError("The answer ended before it was complete.", { broken: true });
}

/** Yield the data of each server-sent event. Comments and other fields are skipped. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = ""; // of a line that is not complete
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (let line of lines) {
        if (line.endsWith("\r")) line = line.slice(0, -1);
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
