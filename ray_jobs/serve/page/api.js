// The server's API: JSON, streams of captions, and the key, which lives as long as the tab.

const KEY = "meddam-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const wait = answer.headers.get("Retry-After");
  const again = wait ? ` Try again in ${wait} s.` : "";
  throw new ApiError(answer.status, (told?.error?.message || `The server answered ${answer.status}.`) + again);
}

export async function post(path, body) {
  return (await send(path, body)).json();
}

/** Streams one caption: onText(piece) as it comes; resolves with what is known of it at the end. */
export async function stream(body, onText, signal) {
  const answer = await send("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const end = {};
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    let at;
    while ((at = rest.indexOf("\n\n")) >= 0) {
      const line = rest.slice(0, at).replace(/^data: /, "");
      rest = rest.slice(at + 2);
      if (line === "[DONE]") return end;
      const event = JSON.parse(line);
      if (event.error) throw new ApiError(event.error.type === "server_error" ? 500 : 400, event.error.message);
      if (event.usage) end.usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) onText(choice.delta.content);
      if (choice.finish_reason) Object.assign(end, { finish_reason: choice.finish_reason, ...choice.meddam });
    }
  }
  throw new ApiError(0, "The answer broke off.");
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^;,]*/, "data:application/octet-stream"));
    reader.onerror = () => reject(new ApiError(0, "The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}
