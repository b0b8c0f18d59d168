/**
 * The load generator, a process of its own: `bun bench/load.ts KIND PORT PID AMOUNT [PORT PID]` with KIND
 * `status` (a breaker), `ping` (a redis-server) or `mcp` (tools/call), for a gateway `request` (one at a
 * time), `requests` (32 at once), `events` (of a stream), `upload` or `download` (of a file), the port and
 * the pid of the server, AMOUNT `1000ms` or a number of answers, and the port and the pid of what a gateway
 * passes requests to. Prints one line of JSON.
 *
 * @module
 */
import { dlopen, ptr } from "bun:ffi";
import { cpus } from "node:os";
import { z } from "zod";
import { FILE_BYTES, paceMs, readClock } from "./openai";

/** What a run has found. */
export interface Load {
  answers: number;
  /** Answers that were not the expected one, and connections that did not end as they should. */
  wrong: number;
  seconds: number;
  /** Processor time of the generator itself: near `seconds`, it and not the server is measured. */
  busySeconds: number;
  /** What half of the answers took at most; null where not measured one by one. */
  p50Ms: number | null;
}

const [kind = "", ...texts] = Bun.argv.slice(2);
const [portText, pidText, amount = "", upstreamPort = "", upstreamPid] = texts;
const port = Number(portText);
const limits = amount.endsWith("ms")
  ? { ms: Number.parseInt(amount), answers: Infinity }
  : { ms: Infinity, answers: Number(amount) };
const NOTHING: Load = { answers: 0, wrong: 0, seconds: 0, busySeconds: 0, p50Ms: null };

// ── System calls ────────────────────────────────────────────────────────────────────────────────

const [AF_INET, SOCK_STREAM, MSG_NOSIGNAL, MSG_WAITALL] = [2, 1, 0x4000, 0x100];

// The sizes that send and recv give fit into 32 bits here.
const libc = dlopen("libc.so.6", {
  socket: { args: ["i32", "i32", "i32"], returns: "i32" },
  connect: { args: ["i32", "ptr", "i32"], returns: "i32" },
  send: { args: ["i32", "ptr", "u64", "i32"], returns: "i32" },
  recv: { args: ["i32", "ptr", "u64", "i32"], returns: "i32" },
  close: { args: ["i32"], returns: "i32" },
  sched_setaffinity: { args: ["i32", "u64", "ptr"], returns: "i32" },
}).symbols;

/**
 * Keeps the generator, and what a gateway passes requests to, on the last processor and the main thread of
 * the server off it: the kernel likes to put two that wake each other on one, where they only take turns.
 * Does nothing where that is not allowed.
 */
function separate(serverPid: number, upstreamPid: number): void {
  const count = cpus().length;
  if (count < 2 || count > 64) return;
  const last = 1n << BigInt(count - 1);
  const move = (pid: number, mask: bigint) => libc.sched_setaffinity(pid, 8, ptr(BigUint64Array.of(mask)));
  move(0, last); // The generator itself.
  move(serverPid, last - 1n);
  if (upstreamPid > 0) move(upstreamPid, last);
}

// ── One connection for each question ────────────────────────────────────────────────────────────
// By system calls, since Bun.connect needs more time for a connection than either server: blocking
// sockets in a ring, so that one call connects, one sends, and the oldest is read next.

const CONNECTIONS = 50;

/**
 * The `sockaddr_in` of 127.0.0.1 … 127.0.0.`count`. A redis-server leaves closing to the client, whose
 * side of the connection then holds its port for a minute (TIME_WAIT), so that one address would run out
 * of ports within a second; a reset would avoid that, but also spare the server the work of a regular end.
 */
function listAddresses(count: number): Uint8Array[] {
  return Array.from({ length: count }, (_, i) =>
    Uint8Array.of(AF_INET, 0, port >> 8, port & 255, 127, 0, 0, i + 1, ...new Array(8).fill(0)),
  );
}

/** Asks `question` again and again, on 50 connections at once, and compares each answer. */
function askAll(
  question: string,
  { expected, addresses, serverCloses }: { expected: string; addresses: Uint8Array[]; serverCloses: boolean },
): Load {
  const asked = Buffer.from(question);
  const wanted = Buffer.from(expected);
  const input = Buffer.alloc(256);
  const [askedAt, inputAt, addressesAt] = [ptr(asked), ptr(input), addresses.map((address) => ptr(address))];
  const load = { ...NOTHING };
  let opened = 0;

  function open(): number {
    const socket = libc.socket(AF_INET, SOCK_STREAM, 0);
    if (libc.connect(socket, addressesAt[opened++ % addresses.length] ?? null, 16) < 0) {
      throw new Error(`Cannot connect to port ${port} after ${load.answers} answers`);
    }
    libc.send(socket, askedAt, asked.length, MSG_NOSIGNAL);
    return socket;
  }

  function finish(socket: number): void {
    const size = libc.recv(socket, inputAt, serverCloses ? input.length : wanted.length, MSG_WAITALL);
    if (size !== wanted.length || input.compare(wanted, 0, size, 0, size) !== 0) load.wrong++;
    libc.close(socket);
    load.answers++;
  }

  const ring = Array.from({ length: CONNECTIONS }, open);
  const usedBefore = process.cpuUsage();
  const startedMs = performance.now();
  for (let i = 0; load.answers < limits.answers && performance.now() - startedMs < limits.ms;) {
    finish(ring[i] ?? -1);
    ring[i] = open();
    i = (i + 1) % CONNECTIONS;
  }
  load.seconds = (performance.now() - startedMs) / 1000;
  const used = process.cpuUsage(usedBefore);
  ring.forEach(finish);
  return { ...load, busySeconds: (used.user + used.system) / 1e6 };
}

// ── One connection for all ──────────────────────────────────────────────────────────────────────

const IN_FLIGHT = 100;

/** Keeps 100 `tools/call` in flight on one connection; looks for `"open":false` in each answer. */
async function callTool(): Promise<Load> {
  const load = { ...NOTHING };
  const finished = Promise.withResolvers<void>();
  const decoder = new TextDecoder();
  let usedBefore = process.cpuUsage();
  let startedMs = 0;
  let asked = 0;
  let partial = "";

  function format(method: string, params: object): string {
    return `${JSON.stringify({ jsonrpc: "2.0", id: asked++, method, params })}\n`;
  }

  function send(socket: Bun.Socket, text: string): void {
    if (socket.write(text) !== text.length) finished.reject(new Error("Cannot send, the server reads too slowly"));
  }

  function call(socket: Bun.Socket, count: number): void {
    let text = "";
    for (let i = 0; i < count; i++) text += format("tools/call", { name: "breaker_status", arguments: {} });
    send(socket, text);
  }

  const client = { protocolVersion: "2025-06-18", capabilities: {}, clientInfo: { name: "bench", version: "1" } };
  const socket = await Bun.connect({
    hostname: "127.0.0.1",
    port,
    socket: {
      open: (socket) => send(socket, format("initialize", client)),
      data(socket, chunk) {
        const lines = (partial + decoder.decode(chunk, { stream: true })).split("\n");
        partial = lines.pop() ?? "";
        if (startedMs === 0) {
          if (lines.length === 0) return;
          send(socket, '{"jsonrpc":"2.0","method":"notifications/initialized"}\n');
          usedBefore = process.cpuUsage();
          startedMs = performance.now();
          return call(socket, IN_FLIGHT);
        }
        load.answers += lines.length;
        for (const line of lines) if (!line.includes('"open":false,"reason":"none"')) load.wrong++;
        if (performance.now() - startedMs >= limits.ms || load.answers >= limits.answers) finished.resolve();
        else if (lines.length > 0) call(socket, lines.length);
      },
      close: () => finished.reject(new Error("The server closed the connection")),
    },
  });
  await finished.promise;
  const used = process.cpuUsage(usedBefore);
  const seconds = (performance.now() - startedMs) / 1000;
  socket.terminate();
  return { ...load, seconds, busySeconds: (used.user + used.system) / 1e6 };
}

// ── Chats ───────────────────────────────────────────────────────────────────────────────────────
// Written and read here, since fetch would need more time for a request than the mock of OpenAI.

const REQUESTS_AT_ONCE = 32;
const MESSAGES = [
  { role: "developer", content: "Answer in ten words." },
  { role: "user", content: "What does a circuit breaker do?" },
];

/** The two fields about Portkey tell it where the request goes, the breaker passes them on. */
function formatChat(more: object = {}): string {
  const body = JSON.stringify({ model: "gpt-4o-mini", messages: MESSAGES, ...more });
  const fields = {
    Host: `127.0.0.1:${port}`,
    Authorization: "Bearer sk-bench",
    Accept: "application/json",
    "User-Agent": "bench",
    "Content-Type": "application/json",
    "Content-Length": body.length,
    ...(upstreamPort && {
      "x-portkey-provider": "openai",
      "x-portkey-custom-host": `http://127.0.0.1:${upstreamPort}/v1`,
    }),
  };
  const head = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`);
  return `POST /v1/chat/completions HTTP/1.1\r\n${head.join("")}\r\n${body}`;
}

/** Whether all of an answer has come; one that has a length or comes in chunks. */
function isComplete(answer: string): boolean {
  const bodyAt = answer.indexOf("\r\n\r\n") + 4;
  if (bodyAt < 4) return false;
  const [, length] = /\r\ncontent-length: (\d+)\r\n/i.exec(answer.slice(0, bodyAt)) ?? [];
  return length ? answer.length >= bodyAt + Number(length) : answer.endsWith("\r\n0\r\n\r\n");
}

function findMedian(values: number[]): number {
  return values.sort((a, b) => a - b)[values.length >> 1] ?? NaN;
}

/** Completes a chat on each of the connections, and again as soon as its answer has come. */
async function completeChats(connections: number): Promise<Load> {
  const load = { ...NOTHING };
  const finished = Promise.withResolvers<void>();
  const delays: number[] = [];
  const question = formatChat();
  let busy = connections;

  function ask(socket: Bun.Socket<{ answer: string; askedMs: number }>): void {
    socket.data = { answer: "", askedMs: performance.now() };
    if (socket.write(question) !== question.length) finished.reject(new Error("Cannot send a request at once"));
  }

  const usedBefore = process.cpuUsage();
  const startedMs = performance.now();
  for (let i = 0; i < connections; i++) {
    void Bun.connect({
      hostname: "127.0.0.1",
      port,
      socket: {
        open: ask,
        data(socket, chunk) {
          socket.data.answer += chunk.toString("latin1");
          const { answer, askedMs } = socket.data;
          if (!isComplete(answer)) return;
          const nowMs = performance.now();
          delays.push(nowMs - askedMs);
          load.answers++;
          if (!answer.startsWith("HTTP/1.1 200 ") || !answer.includes('"usage":{')) load.wrong++;
          if (nowMs - startedMs < limits.ms && load.answers < limits.answers) ask(socket);
          else if (--busy === 0) finished.resolve();
        },
        close: () => finished.reject(new Error("The server closed the connection")),
      },
    }).catch(finished.reject);
  }
  await finished.promise;
  const used = process.cpuUsage(usedBefore);
  const seconds = (performance.now() - startedMs) / 1000;
  return { ...load, seconds, busySeconds: (used.user + used.system) / 1e6, p50Ms: findMedian(delays) };
}

/** Follows one stream to its end; an event took from the moment that it carries to its arrival. */
async function followStream(): Promise<Load> {
  const load = { ...NOTHING };
  const finished = Promise.withResolvers<void>();
  const delays: number[] = [];
  let partial = "";
  const startedMs = performance.now();
  await Bun.connect({
    hostname: "127.0.0.1",
    port,
    socket: {
      open: (socket) => void socket.write(formatChat({ stream: true, max_completion_tokens: limits.answers })),
      data(_, chunk) {
        const nowMs = readClock();
        const events = (partial + chunk.toString("latin1")).split("\n\n");
        partial = events.pop() ?? "";
        for (const event of events) {
          const [, sentMs] = /"sent":([\d.]+)/.exec(event) ?? [];
          if (sentMs) delays.push(nowMs - Number(sentMs));
          else if (!event.endsWith("data: [DONE]")) load.wrong++; // The usage too: only the gateway asks for it.
        }
        if (partial.endsWith("0\r\n\r\n")) finished.resolve();
        else if (isComplete(partial)) finished.reject(new Error(`Not a stream: ${partial.slice(0, 500)}`));
      },
      close: () => finished.reject(new Error("The server closed the connection")),
    },
  });
  await finished.promise;
  load.answers = delays.length;
  load.wrong += Math.abs(limits.answers - delays.length);
  return { ...load, seconds: (performance.now() - startedMs) / 1000, p50Ms: findMedian(delays) };
}

// ── Files ───────────────────────────────────────────────────────────────────────────────────────

const UploadedSchema = z.object({ bytes: z.number() });

/** Sends a file as fast as it is taken, which is slowly. */
async function upload(): Promise<Load> {
  const startedMs = performance.now();
  const body = new Uint8Array(FILE_BYTES);
  const response = await fetch(`http://127.0.0.1:${port}/v1/files`, { method: "POST", body });
  const { bytes } = UploadedSchema.parse(await response.json());
  return {
    ...NOTHING,
    answers: 1,
    wrong: bytes === FILE_BYTES ? 0 : 1,
    seconds: (performance.now() - startedMs) / 1000,
  };
}

/** Reads a file slowly. */
async function download(): Promise<Load> {
  const startedMs = performance.now();
  const { body } = await fetch(`http://127.0.0.1:${port}/v1/files/file-bench/content`);
  let bytes = 0;
  for await (const piece of body ?? []) {
    bytes += piece.length;
    await Bun.sleep(paceMs(bytes, startedMs));
  }
  return {
    ...NOTHING,
    answers: 1,
    wrong: bytes === FILE_BYTES ? 0 : 1,
    seconds: (performance.now() - startedMs) / 1000,
  };
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

function run(): Load | Promise<Load> {
  switch (kind) {
    case "status":
      return askAll("STATUS\n", { expected: "FALSE\n", addresses: listAddresses(1), serverCloses: true });
    case "ping":
      return askAll("PING\r\n", { expected: "+PONG\r\n", addresses: listAddresses(16), serverCloses: false });
    case "mcp":
      return callTool();
    case "request":
      return completeChats(1);
    case "requests":
      return completeChats(REQUESTS_AT_ONCE);
    case "events":
      return followStream();
    case "upload":
      return upload();
    case "download":
      return download();
    default:
      throw new Error(`${kind}: expected status, ping, mcp, request, requests, events, upload or download`);
  }
}

if (import.meta.main) {
  separate(Number(pidText), Number(upstreamPid ?? 0));
  console.log(JSON.stringify(await run()));
  process.exit();
}
