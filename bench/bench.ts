/**
 * Measures the breaker side by side with others: `just bench`, about two and a half minutes, on Linux with glibc.
 *
 * Each figure is the median of alternating runs (breaker, other, breaker, other, …) and each ratio the
 * median of the ratios of the pairs: machines and moments differ, ratios hold. All traffic is on loopback.
 * Ends with 1 where a floor is missed.
 *
 * @module
 */
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import type { Load } from "./load";

const PAIRS = 13;
const RUN_MS = 1000;
const STARTS = 15;
const MANY_ANSWERS = 1_000_000;
const SETTLE_IDLE_MS = 3000;
const SETTLE_AFTER_MS = 15_000;
const INTERVAL_MS = 60_000;
const READY_LIMIT_MS = 10_000;
const LOAD_LIMIT_MS = 120_000;
const INSTALL_LIMIT_MS = 60_000;
const BENCH_LIMIT_MS = 5 * 60_000;
const TICKS_PER_SECOND = 100;
const MIB = 1024 * 1024;

const HERE = import.meta.dir;
const BREAKER = join(HERE, "..", "breaker.ts");
const BUN = [process.execPath, "--no-env-file"];

// ── Rows ────────────────────────────────────────────────────────────────────────────────────────

interface Row {
  what: string;
  ours: string;
  other: string;
  /** What floor and aim are about: a ratio, a difference or the figure itself. */
  value: number;
  unit: keyof typeof FORMATS;
  floor: number;
  aim: number;
  better: "higher" | "lower";
}

function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const [low = NaN, high = NaN] = [sorted[sorted.length % 2 ? middle : middle - 1], sorted[middle]];
  return (low + high) / 2;
}

const FORMATS = {
  count: (value: number) => String(value),
  ratio: (ratio: number) => ratio.toFixed(2),
  rate: (rate: number) => `${Math.round(rate)}/s`,
  micros: (seconds: number) => `${(seconds * 1e6).toFixed(1)} µs`,
  ms: (ms: number) => `${ms.toFixed(1)} ms`,
  mib: (bytes: number) => `${(bytes / MIB).toFixed(1)} MiB`,
};

/** What a row reaches: `aim`, `floor` or `NO`. */
function grade({ value, floor, aim, better }: Row): "aim" | "floor" | "NO" {
  const reaches = (goal: number) => (better === "higher" ? value >= goal : value <= goal);
  return reaches(aim) ? "aim" : reaches(floor) ? "floor" : "NO";
}

function formatTable(rows: Row[]): string {
  const cells = rows.map((row) => {
    const { what, ours, other, value, unit, floor, aim } = row;
    return [what, ours, other, ...[value, floor, aim].map(FORMATS[unit]), grade(row)];
  });
  const table = [["what", "breaker", "other", "compared", "floor", "aim", "reached"], ...cells];
  const width = (column: number) => Math.max(...table.map((line) => line[column]?.length ?? 0));
  const pad = (cell: string, column: number) => (column === 0 ? cell.padEnd(width(0)) : cell.padStart(width(column)));
  return table.map((line) => `${line.map(pad).join("  ")}\n`).join("");
}

// ── Processes ───────────────────────────────────────────────────────────────────────────────────

type Child = Bun.Subprocess<"ignore", "pipe", "pipe">;
type Env = Record<string, string | undefined>;

const started = new Set<Child>();
const folder = mkdtempSync(join(tmpdir(), "breaker-bench-"));

function spawn(argv: string[], env: Env = process.env): Child {
  const child = Bun.spawn(argv, { cwd: folder, env, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
  started.add(child);
  void child.exited.then(() => started.delete(child));
  return child;
}

/** Ends a process by its pid, the hard way after 2 s. */
async function end(child: Child): Promise<void> {
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), 2000);
  await child.exited;
  clearTimeout(timer);
}

/** Runs a program to its end, gives what it printed; throws where it fails or takes too long. */
async function run(argv: string[], limitMs: number): Promise<string> {
  const child = spawn(argv);
  const timer = setTimeout(() => void end(child), limitMs);
  const [code, out, err] = await Promise.all([child.exited, child.stdout.text(), child.stderr.text()]);
  clearTimeout(timer);
  if (code !== 0) throw new Error(`${argv.join(" ")} ended with ${child.signalCode ?? code}: ${err.slice(-500)}`);
  return out;
}

interface Server {
  child: Child;
  port: number;
}

/** Starts a server and waits until it prints `ready`, whose first group, where it has one, is the port. */
async function serve(
  argv: string[],
  { ready, env, port }: { ready: RegExp; env?: Env; port?: number },
): Promise<Server> {
  const child = spawn(argv, env);
  const matched = Promise.withResolvers<RegExpExecArray>();
  let printed = "";
  const follow = async (stream: Child["stdout"]) => {
    for await (const chunk of stream.pipeThrough(new TextDecoderStream())) {
      if (printed.length < 4096) printed += chunk;
      const match = ready.exec(printed);
      if (match) matched.resolve(match);
    }
  };
  const refuse = () => matched.reject(new Error(`${argv.join(" ")} does not get ready: ${printed}`));
  const timer = setTimeout(refuse, READY_LIMIT_MS);
  void Promise.all([follow(child.stdout), follow(child.stderr)]).then(refuse);
  const [, found] = await matched.promise;
  clearTimeout(timer);
  return { child, port: port ?? Number(found) };
}

// ── The upstream and the servers ────────────────────────────────────────────────────────────────

/** An account without costs, which can hang: it accepts, and answers only once released. */
function startUpstream() {
  let gate = Promise.withResolvers<void>();
  gate.resolve();
  let requests = 0;
  let hanging = 0;
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch() {
      requests++;
      hanging++;
      await gate.promise;
      hanging--;
      return Response.json({ object: "page", data: [], has_more: false, next_page: null });
    },
  });
  return {
    url: `http://127.0.0.1:${server.port}/v1`,
    requests: () => requests,
    hanging: () => hanging,
    hang: () => void (gate = Promise.withResolvers()),
    release: () => gate.resolve(),
  };
}

type Upstream = ReturnType<typeof startUpstream>;

/** Starts a breaker and waits for its first answer, which rests on its first look. */
async function startBreaker(upstream: Upstream): Promise<Server> {
  const flags = ["--port", "0", "--host", "127.0.0.1", "--base-url", upstream.url, "--source", "costs"];
  const { PATH, HOME } = process.env; // Without HOME Bun has no cache for what it transpiles.
  const env = { PATH, HOME, OPENAI_ADMIN_KEY: "sk-admin-bench" };
  const breaker = await serve([...BUN, BREAKER, ...flags], { ready: /listens on \S+?:(\d+)/, env });
  const answered = Promise.withResolvers<string>();
  await Bun.connect({
    hostname: "127.0.0.1",
    port: breaker.port,
    socket: {
      open: (socket) => void socket.write("STATUS\n"),
      data: (_, chunk) => answered.resolve(chunk.toString()),
      close: () => answered.resolve("nothing"),
    },
  });
  const answer = await answered.promise;
  if (answer !== "FALSE\n") throw new Error(`The first answer is ${answer}`);
  return breaker;
}

/** Throws where there is no redis-server. */
async function startRedis(): Promise<Server> {
  const program = Bun.which("redis-server");
  if (!program) throw new Error("there is no redis-server");
  const probe = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = probe;
  probe.stop(true);
  const addresses = Array.from({ length: 16 }, (_, i) => `127.0.0.${i + 1}`);
  const flags = ["--save", "", "--appendonly", "no", "--port", String(port), "--bind", ...addresses];
  return serve([program, ...flags], { ready: /Ready to accept connections/i, port });
}

/** Installs the official SDK into the temporary folder; throws where that is not possible. */
async function installSdk(): Promise<string[]> {
  const [node, npm] = [Bun.which("node"), Bun.which("npm")];
  if (!node || !npm) throw new Error("there is no node with npm");
  const flags = ["--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts"];
  await run([npm, "install", ...flags, "@modelcontextprotocol/sdk@1.32.2"], INSTALL_LIMIT_MS);
  copyFileSync(join(HERE, "mcp-sdk-server.mjs"), join(folder, "server.mjs"));
  return [node, join(folder, "server.mjs")];
}

/** Gives null, and says so in one line, where what the rows need is missing. */
async function orSkip<T>(rows: string, making: Promise<T>): Promise<T | null> {
  return making.catch((error: Error) => {
    console.log(`Skipped ${rows}: ${error.message.replaceAll(/\s+/g, " ").slice(0, 300)}`);
    return null;
  });
}

// ── Measuring ───────────────────────────────────────────────────────────────────────────────────

const LoadSchema = z.object({
  answers: z.number().positive(),
  wrong: z.literal(0),
  seconds: z.number(),
  busySeconds: z.number(),
}) satisfies z.ZodType<Load>;

/** User and system time of a process, in seconds. */
function readBusySeconds({ pid }: Child): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

/** Resident memory of a process, in bytes. */
function readMemory({ pid }: Child): number {
  const [, kib] = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return Number(kib) * 1024;
}

interface Figures {
  /** Answers a second. */
  rate: number;
  /** Processor time of the server for each answer, in seconds. */
  cost: number;
  /** Parts of one core that the server and the generator were busy. */
  serverBusy: number;
  loadBusy: number;
}

/** Puts a load on a server; throws where an answer was not the expected one. */
async function measure({ child, port }: Server, kind: string, amount = `${RUN_MS}ms`): Promise<Figures> {
  const before = readBusySeconds(child);
  const argv = [...BUN, join(HERE, "load.ts"), kind, String(port), String(child.pid), amount];
  const out = await run(argv, LOAD_LIMIT_MS);
  const busy = readBusySeconds(child) - before;
  const load = LoadSchema.safeParse(JSON.parse(out));
  if (!load.success) throw new Error(`Wrong answers under the load ${kind}: ${out}`);
  const { answers, seconds, busySeconds } = load.data;
  return { rate: answers / seconds, cost: busy / answers, serverBusy: busy / seconds, loadBusy: busySeconds / seconds };
}

/** Measures by turns, after one turn that only warms up. */
async function measurePairs<T>(pairs: number, { ours, other }: { ours: () => Promise<T>; other: () => Promise<T> }) {
  const measured: { ours: T; other: T }[] = [];
  for (let i = -1; i < pairs; i++) {
    const pair = { ours: await ours(), other: await other() };
    if (i >= 0) measured.push(pair);
  }
  return measured;
}

type Pairs = { ours: Figures; other: Figures }[];

/** A row of two rates, or two costs, and the median ratio of the pairs. */
function compare(
  pairs: Pairs,
  { figure, ...row }: { figure: "rate" | "cost" } & Pick<Row, "what" | "floor" | "aim">,
): Row {
  const format = figure === "rate" ? FORMATS.rate : FORMATS.micros;
  return {
    ...row,
    ours: format(median(pairs.map(({ ours }) => ours[figure]))),
    other: format(median(pairs.map(({ other }) => other[figure]))),
    value: median(pairs.map(({ ours, other }) => ours[figure] / other[figure])),
    unit: "ratio",
    better: figure === "rate" ? "higher" : "lower",
  };
}

/** Prints the ratio of each pair, and how busy server and generator were: which of them was measured. */
function report(what: string, pairs: Pairs): void {
  const percent = (parts: number[]) => `${Math.round(100 * median(parts))} %`;
  const [ours, other] = [pairs.map((pair) => pair.ours), pairs.map((pair) => pair.other)].map(
    (side) => `${percent(side.map((run) => run.serverBusy))} (generator ${percent(side.map((run) => run.loadBusy))})`,
  );
  const ratios = pairs.map((pair) => FORMATS.ratio(pair.ours.rate / pair.other.rate)).join(" ");
  console.log(`${what}: breaker busy ${ours}, other ${other} of a core; ratios ${ratios}`);
}

async function measureStatus(breaker: Server): Promise<Row[]> {
  const redis = await orSkip("the rows against redis-server", startRedis());
  if (!redis) return [];
  const pairs = await measurePairs(PAIRS, {
    ours: () => measure(breaker, "status"),
    other: () => measure(redis, "ping"),
  });
  await end(redis.child);
  report("STATUS", pairs);
  return [
    compare(pairs, { what: "STATUS, 50 at once, against PING of redis-server", figure: "rate", floor: 0.9, aim: 1.1 }),
    compare(pairs, { what: "  processor time for an answer", figure: "cost", floor: 1.25, aim: 1 }),
  ];
}

/** Gives the breaker against itself while every request of its look hangs. */
async function measureHanging(breaker: Server, upstream: Upstream): Promise<Row[]> {
  const pairs = await measurePairs(PAIRS, {
    async ours() {
      upstream.hang();
      breaker.child.kill("SIGHUP"); // Look now.
      for (let i = 0; upstream.hanging() === 0 && i < 1000; i++) await Bun.sleep(1);
      const figures = await measure(breaker, "status");
      if (upstream.hanging() === 0) throw new Error("The look did not hang");
      upstream.release();
      return figures;
    },
    other: () => measure(breaker, "status"),
  });
  report("STATUS while the endpoint hangs", pairs);
  return [
    compare(pairs, { what: "STATUS while the endpoint hangs, against healthy", figure: "rate", floor: 0.9, aim: 1 }),
  ];
}

async function measureMcp(breaker: Server, sdkArgv: string[] | null): Promise<Row[]> {
  if (!sdkArgv) return [];
  const sdk = await serve(sdkArgv, { ready: /listens on \S+?:(\d+)/ });
  const pairs = await measurePairs(PAIRS, { ours: () => measure(breaker, "mcp"), other: () => measure(sdk, "mcp") });
  await end(sdk.child);
  report("MCP", pairs);
  return [compare(pairs, { what: "MCP tools/call, 100 in flight, against the SDK", figure: "rate", floor: 3, aim: 5 })];
}

/** Compares what the breaker has asked the endpoint for, under all the loads, with what was due. */
function countRequests(upstream: Upstream, { sinceMs, hurried }: { sinceMs: number; hurried: number }): Row {
  const due = 1 + hurried + Math.floor((performance.now() - sinceMs) / INTERVAL_MS);
  const value = upstream.requests();
  const figures = { ours: `${value}`, other: `${due} due`, value, floor: due, aim: due };
  return { what: "requests to the endpoint under these loads", ...figures, unit: "count", better: "lower" };
}

async function measureMemory(upstream: Upstream): Promise<Row[]> {
  const breaker = await startBreaker(upstream);
  await Bun.sleep(SETTLE_IDLE_MS);
  const idle = readMemory(breaker.child);
  await measure(breaker, "status", String(MANY_ANSWERS));
  await Bun.sleep(SETTLE_AFTER_MS);
  const after = readMemory(breaker.child);
  await end(breaker.child);
  const row = (what: string, { ours, ...goals }: { ours: number } & Pick<Row, "value" | "floor" | "aim">): Row => ({
    ...{ what, ours: FORMATS.mib(ours), other: "", unit: "mib", better: "lower" },
    ...goals,
  });
  return [
    row("resident memory, idle", { ours: idle, value: idle, floor: 64 * MIB, aim: 50 * MIB }),
    row("  15 s after a million STATUS, above idle", {
      ours: after,
      value: after - idle,
      floor: 16 * MIB,
      aim: 4 * MIB,
    }),
  ];
}

/** ms from the start of a breaker to its first answer. */
async function timeStart(upstream: Upstream): Promise<number> {
  const startedMs = performance.now();
  const { child } = await startBreaker(upstream);
  const ms = performance.now() - startedMs;
  await end(child);
  return ms;
}

/** ms from the start of an empty script to its end. */
async function timeEmpty(script: string): Promise<number> {
  const startedMs = performance.now();
  await spawn([...BUN, script]).exited;
  return performance.now() - startedMs;
}

async function measureStart(upstream: Upstream): Promise<Row[]> {
  const script = join(folder, "empty.ts");
  await Bun.write(script, "");
  const pairs = await measurePairs(STARTS, { ours: () => timeStart(upstream), other: () => timeEmpty(script) });
  const ours = FORMATS.ms(median(pairs.map((pair) => pair.ours)));
  const other = FORMATS.ms(median(pairs.map((pair) => pair.other)));
  const value = median(pairs.map((pair) => pair.ours - pair.other));
  const what = "start to first STATUS answered, above an empty script";
  return [{ what, ours, other, value, unit: "ms", floor: 100, aim: 50, better: "lower" }];
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

async function measureAll(): Promise<Row[]> {
  const sdkArgv = await orSkip("the row against the MCP SDK", installSdk());
  const upstream = startUpstream();
  const sinceMs = performance.now();
  const breaker = await startBreaker(upstream);
  const rows = [
    ...(await measureStatus(breaker)),
    ...(await measureHanging(breaker, upstream)),
    ...(await measureMcp(breaker, sdkArgv)),
    countRequests(upstream, { sinceMs, hurried: PAIRS + 1 }),
  ];
  await end(breaker.child);
  const quiet = startUpstream();
  return [...rows, ...(await measureMemory(quiet)), ...(await measureStart(quiet))];
}

let stopping = false;

async function cleanUp(): Promise<void> {
  stopping = true;
  await Promise.all([...started].map(end));
  rmSync(folder, { recursive: true, force: true });
}

/** Of several reasons the first counts, the others are its effects. */
async function stop(reason: string): Promise<never> {
  if (!stopping) console.error(reason);
  await cleanUp();
  process.exit(2);
}

process.on("SIGINT", () => void stop("Interrupted"));
process.on("SIGTERM", () => void stop("Interrupted"));
setTimeout(() => void stop("The benchmark takes too long"), BENCH_LIMIT_MS);
console.log(`Bun ${Bun.version} on ${cpus().length} × ${cpus()[0]?.model}`);
const rows = await measureAll().catch((error: Error) => stop(error.message));
await cleanUp();
console.log(`\n${formatTable(rows)}`);
process.exit(rows.some((row) => grade(row) === "NO") ? 1 : 0);
