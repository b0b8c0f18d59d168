/**
 * A mock of OpenAI for the gateway's rows, a process of its own: `bun bench/openai.ts`. The account costs
 * nothing; a chat completion is answered at once, or as a stream of `max_completion_tokens` events; a file
 * is taken slowly and given as fast as it is read.
 *
 * @module
 */
import { z } from "zod";

/** The size of an uploaded and of a downloaded file. */
export const FILE_BYTES = 100_000_000;

const BYTES_PER_MS = 25_000;
const PIECE_BYTES = 64 * 1024;
const EVENT_EVERY_MS = 1;
const MODEL = "gpt-4o-mini-2024-07-18";
const USAGE = { prompt_tokens: 20, completion_tokens: 10, total_tokens: 30 };

/** ms that a slow reader must wait who has read `bytes` since `sinceMs`, a moment of `performance.now()`. */
export function paceMs(bytes: number, sinceMs: number): number {
  return Math.max(0, bytes / BYTES_PER_MS - (performance.now() - sinceMs));
}

/** ms since 1970, finer than `Date.now()`, and comparable between processes. */
export function readClock(): number {
  return performance.timeOrigin + performance.now();
}

// ── Chat completions ────────────────────────────────────────────────────────────────────────────

const ChatSchema = z.object({
  stream: z.boolean().default(false),
  stream_options: z.object({ include_usage: z.boolean() }).optional(),
  max_completion_tokens: z.number().default(10),
});

type Chat = z.infer<typeof ChatSchema>;

const run = crypto.randomUUID();
let answers = 0;

function describe(object: string) {
  return { id: `chatcmpl-${run}-${answers++}`, object, created: Math.floor(Date.now() / 1000), model: MODEL };
}

/** The events of a stream, each with the moment when it was sent. */
async function* streamChat({ stream_options, max_completion_tokens }: Chat) {
  const base = describe("chat.completion.chunk");
  const usage = stream_options?.include_usage ? { usage: null } : {};
  const choices = [{ index: 0, delta: { content: " word" }, logprobs: null, finish_reason: null }];
  for (let i = 0; i < max_completion_tokens; i++) {
    yield `data: ${JSON.stringify({ sent: readClock(), ...base, choices, ...usage })}\n\n`;
    await Bun.sleep(EVENT_EVERY_MS);
  }
  if (stream_options?.include_usage) yield `data: ${JSON.stringify({ ...base, choices: [], usage: USAGE })}\n\n`;
  yield "data: [DONE]\n\n";
}

async function answerChat(request: Request): Promise<Response> {
  const chat = ChatSchema.parse(await request.json());
  if (chat.stream) return new Response(streamChat(chat), { headers: { "content-type": "text/event-stream" } });
  const message = { role: "assistant", content: "word ".repeat(10), refusal: null, annotations: [] };
  const choices = [{ index: 0, message, logprobs: null, finish_reason: "stop" }];
  return Response.json({ ...describe("chat.completion"), choices, usage: USAGE });
}

// ── Files ───────────────────────────────────────────────────────────────────────────────────────

async function takeFile({ body }: Request): Promise<Response> {
  const startedMs = performance.now();
  let bytes = 0;
  for await (const piece of body ?? []) {
    bytes += piece.length;
    await Bun.sleep(paceMs(bytes, startedMs));
  }
  return Response.json({ id: "file-bench", object: "file", bytes });
}

async function* streamFile() {
  const piece = new Uint8Array(PIECE_BYTES).fill(0x61);
  for (let left = FILE_BYTES; left > 0; left -= piece.length) yield piece.subarray(0, left);
}

function giveFile(): Response {
  const headers = { "content-type": "application/octet-stream", "content-length": String(FILE_BYTES) };
  return new Response(streamFile(), { headers });
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

if (import.meta.main) {
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    idleTimeout: 0,
    routes: {
      "/v1/organization/*": () => Response.json({ object: "page", data: [], has_more: false, next_page: null }),
      "/v1/chat/completions": { POST: answerChat },
      "/v1/files": { POST: takeFile },
      "/v1/files/:id/content": { GET: giveFile },
    },
  });
  console.log(`listens on 127.0.0.1:${server.port}`);
}
