/**
 * The load generator, a process of its own: `bun bench/load.ts KIND PORT PID AMOUNT` with KIND
 * `status` (a breaker), `ping` (a redis-server) or `mcp` (tools/call), the port and the pid of the server,
 * and AMOUNT `1000ms` or a number of answers. Prints one line of JSON.
 *
 * @module
 */
import { dlopen, ptr } from "bun:ffi";
import { cpus } from "node:os";

/** What a run has found. */
export interface Load {
  answers: number;
  /** Answers that were not the expected one, and connections that did not end as they should. */
  wrong: number;
  seconds: number;
  /** Processor time of the generator itself: near `seconds`, it and not the server is measured. */
  busySeconds: number;
}

const [kind = "", portText = "", pidText = "", amount = ""] = Bun.argv.slice(2);
const port = Number(portText);
const limits = amount.endsWith("ms")
  ? { ms: Number.parseInt(amount), answers: Infinity }
  : { ms: Infinity, answers: Number(amount) };

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
 * Keeps the generator on the last processor and the main thread of the server off it: the kernel likes to
 * put two that wake each other on one, where they only take turns. Does nothing where that is not allowed.
 */
function separate(serverPid: number): void {
  const count = cpus().length;
  if (count < 2 || count > 64) return;
  const last = 1n << BigInt(count - 1);
  for (const [pid, mask] of [
    [0, last],
    [serverPid, last - 1n],
  ] as const) {
    libc.sched_setaffinity(pid, 8, ptr(BigUint64Array.of(mask)));
  }
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
  const load: Load = { answers: 0, wrong: 0, seconds: 0, busySeconds: 0 };
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
  const load: Load = { answers: 0, wrong: 0, seconds: 0, busySeconds: 0 };
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

// ── main ────────────────────────────────────────────────────────────────────────────────────────

function run(): Load | Promise<Load> {
  switch (kind) {
    case "status":
      return askAll("STATUS\n", { expected: "FALSE\n", addresses: listAddresses(1), serverCloses: true });
    case "ping":
      return askAll("PING\r\n", { expected: "+PONG\r\n", addresses: listAddresses(16), serverCloses: false });
    case "mcp":
      return callTool();
    default:
      throw new Error(`${kind}: expected status, ping or mcp`);
  }
}

if (import.meta.main) {
  separate(Number(pidText));
  console.log(JSON.stringify(await run()));
  process.exit();
}
