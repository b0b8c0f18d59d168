/**
 * Measures the breaker side by side with others: `just bench`, four to five minutes, on Linux with glibc.
 * `just bench start gateway` measures only these groups of rows; there are `status`, `mcp`, `memory`, `start`
 * and `gateway`.
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
const GATEWAY_PAIRS = 9;
const EVENTS = 500;
const MANY_ANSWERS = 1_000_000;
const SETTLE_IDLE_MS = 3000;
const SETTLE_AFTER_MS = 15_000;
const SAMPLE_MS = 5;
const INTERVAL_MS = 60_000;
const READY_LIMIT_MS = 10_000;
const LOAD_LIMIT_MS = 120_000;
const INSTALL_LIMIT_MS = 60_000;
const BENCH_LIMIT_MS = 8 * 60_000;
const TICKS_PER_SECOND = 100;
const MIB = 1024 * 1024;

const HERE = import.meta.dir;
const BREAKER = join(HERE, "..", "breaker.ts");
const BUN = [process.execPath, "--no-env-file"];
const LISTENS = /listens on \S+?:(\d+)/;
const { PATH, HOME } = process.env; // Without HOME Bun has no cache for what it transpiles.

// ── Groups of rows ──────────────────────────────────────────────────────────────────────────────

const GROUPS = ["status", "mcp", "memory", "start", "gateway"] as const;
type Group = (typeof GROUPS)[number];

/** The groups of the command line, or all. */
function readGroups(names: string[]): Group[] {
  const groups = z.array(z.enum(GROUPS)).safeParse(names);
  if (!groups.success) {
    console.error(`Unknown group of rows: ${names.join(" ")}, expected any of ${GROUPS.join(", ")}`);
    process.exit(64);
  }
  return groups.data.length > 0 ? groups.data : [...GROUPS];
}

const groups = readGroups(Bun.argv.slice(2));

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
  delay: (ms: number) => `${ms.toFixed(2)} ms`,
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
  let hurried = 0;
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
    /** How often it was made to hang: so many looks come before their time. */
    hurried: () => hurried,
    hanging: () => hanging,
    hang() {
      hurried++;
      gate = Promise.withResolvers();
    },
    release: () => gate.resolve(),
  };
}

type Upstream = ReturnType<typeof startUpstream>;

/** Asks a breaker one line, gives all that it answers. */
async function ask({ port }: Server, line: string): Promise<string> {
  const answered = Promise.withResolvers<string>();
  let answer = "";
  await Bun.connect({
    hostname: "127.0.0.1",
    port,
    socket: {
      open: (socket) => void socket.write(`${line}\n`),
      data: (_, chunk) => void (answer += chunk.toString()),
      close: () => answered.resolve(answer),
    },
  });
  return answered.promise;
}

/** Starts a breaker and waits for its first answer, which rests on its first look. */
async function startBreaker({ url }: { url: string }, more: string[] = []): Promise<Server> {
  const flags = ["--port", "0", "--host", "127.0.0.1", "--base-url", url, "--source", "costs", ...more];
  const env = { PATH, HOME, OPENAI_ADMIN_KEY: "sk-admin-bench" };
  const breaker = await serve([...BUN, BREAKER, ...flags], { ready: LISTENS, env });
  const answer = await ask(breaker, "STATUS");
  if (answer !== "FALSE\n") throw new Error(`The first answer is ${answer}`);
  return breaker;
}

const InfoSchema = z.object({ gateway: z.url(), allowances: z.tuple([z.object({ used: z.number() })]) });

async function askInfo(breaker: Server): Promise<z.infer<typeof InfoSchema>> {
  return InfoSchema.parse(JSON.parse(await ask(breaker, "INFO")));
}

type Openai = Server & { url: string };

/** Starts a breaker that passes requests on and counts their tokens; gives its port for them too. */
async function startGateway(openai: Openai): Promise<{ breaker: Server; gateway: Server }> {
  const breaker = await startBreaker(openai, ["--gateway", "0", "--allowance", "*=1G"]);
  const { gateway } = await askInfo(breaker);
  return { breaker, gateway: { ...breaker, port: Number(new URL(gateway).port) } };
}

/** Starts a mock of OpenAI in a process of its own. */
async function startOpenai(): Promise<Openai> {
  const server = await serve([...BUN, join(HERE, "openai.ts")], { ready: LISTENS });
  return { ...server, url: `http://127.0.0.1:${server.port}/v1` };
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

/** Starts a server of bench/ on Node beside an installation of what it needs; throws where that is not possible. */
async function startOnNode(script: string, dependency: string): Promise<Server> {
  const [node, npm] = [Bun.which("node"), Bun.which("npm")];
  if (!node || !npm) throw new Error("there is no node with npm");
  const place = mkdtempSync(join(folder, "node-"));
  const flags = ["--prefix", place, "--no-audit", "--no-fund", "--ignore-scripts"];
  await run([npm, "install", ...flags, dependency], INSTALL_LIMIT_MS);
  copyFileSync(join(HERE, script), join(place, script));
  const argv = [node, join(place, script), "--headless"]; // Without a web page, and its log, of Portkey.
  return serve(argv, { ready: LISTENS, env: { PATH, HOME, NODE_ENV: "production" } });
}

function startSdk(): Promise<Server> {
  return startOnNode("mcp-sdk-server.mjs", "@modelcontextprotocol/sdk@1.32.2");
}

/** Starts the other gateway, and makes sure that it passes a request on. */
async function startPortkey(openai: Openai): Promise<Server> {
  const portkey = await startOnNode("portkey-server.mjs", "@portkey-ai/gateway@1.15.2");
  await measure(portkey, "requests", { amount: "1", upstream: openai });
  return portkey;
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
  p50Ms: z.number().nullable(),
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
  /** What half of the answers took at most, where the load measures that. */
  p50Ms: number;
}

/** Puts a load on a server; throws where an answer was not the expected one. */
async function measure(
  { child, port }: Server,
  kind: string,
  { amount = `${RUN_MS}ms`, upstream }: { amount?: string; upstream?: Server } = {},
): Promise<Figures> {
  const before = readBusySeconds(child);
  const numbers = [port, child.pid, amount, ...(upstream ? [upstream.port, upstream.child.pid] : [])];
  const argv = [...BUN, join(HERE, "load.ts"), kind, ...numbers.map(String)];
  const out = await run(argv, LOAD_LIMIT_MS);
  const busy = readBusySeconds(child) - before;
  const load = LoadSchema.safeParse(JSON.parse(out));
  if (!load.success) throw new Error(`Wrong answers under the load ${kind}: ${out}`);
  const { answers, seconds, busySeconds, p50Ms } = load.data;
  const [serverBusy, loadBusy] = [busy / seconds, busySeconds / seconds];
  return { rate: answers / seconds, cost: busy / answers, serverBusy, loadBusy, p50Ms: p50Ms ?? NaN };
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

/** A row of what passing through something takes above going straight. */
function compareDelays(pairs: Pairs, row: Pick<Row, "what" | "floor" | "aim">): Row {
  return {
    ...row,
    ours: FORMATS.delay(median(pairs.map(({ ours }) => ours.p50Ms))),
    other: FORMATS.delay(median(pairs.map(({ other }) => other.p50Ms))),
    value: median(pairs.map(({ ours, other }) => ours.p50Ms - other.p50Ms)),
    unit: "delay",
    better: "lower",
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
  const ours = () => measure(breaker, "status");
  const rows: Row[] = [];
  const redis = await orSkip("the rows against redis-server", startRedis());
  if (redis) {
    const pairs = await measurePairs(PAIRS, { ours, other: () => measure(redis, "ping") });
    await end(redis.child);
    report("STATUS", pairs);
    rows.push(
      compare(pairs, {
        what: "STATUS, 50 at once, against PING of redis-server",
        figure: "rate",
        floor: 0.9,
        aim: 1.1,
      }),
      compare(pairs, { what: "  processor time for an answer", figure: "cost", floor: 1.25, aim: 1 }),
    );
  }
  const bare = await serve([...BUN, join(HERE, "bare.ts")], { ready: LISTENS });
  const pairs = await measurePairs(PAIRS, { ours, other: () => measure(bare, "status") });
  await end(bare.child);
  report("STATUS against a bare Bun.listen", pairs);
  const what = "STATUS, 50 at once, against a bare Bun.listen";
  return [...rows, compare(pairs, { what, figure: "rate", floor: 0.85, aim: 0.97 })];
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

async function measureMcp(breaker: Server): Promise<Row[]> {
  const sdk = await orSkip("the row against the MCP SDK", startSdk());
  if (!sdk) return [];
  const pairs = await measurePairs(PAIRS, { ours: () => measure(breaker, "mcp"), other: () => measure(sdk, "mcp") });
  await end(sdk.child);
  report("MCP", pairs);
  return [compare(pairs, { what: "MCP tools/call, 100 in flight, against the SDK", figure: "rate", floor: 3, aim: 6 })];
}

/** Compares what the breaker has asked the endpoint for, under all the loads, with what was due. */
function countRequests(upstream: Upstream, sinceMs: number): Row {
  const due = 1 + upstream.hurried() + Math.floor((performance.now() - sinceMs) / INTERVAL_MS);
  const value = upstream.requests();
  const figures = { ours: `${value}`, other: `${due} due`, value, floor: due, aim: due };
  return { what: "requests to the endpoint under these loads", ...figures, unit: "count", better: "lower" };
}

/** The rows of STATUS and MCP, whose loads meet one breaker, and what it has asked meanwhile. */
async function measureAnswers(): Promise<Row[]> {
  const upstream = startUpstream();
  const sinceMs = performance.now();
  const breaker = await startBreaker(upstream);
  const rows: Row[] = [];
  if (groups.includes("status")) {
    rows.push(...(await measureStatus(breaker)), ...(await measureHanging(breaker, upstream)));
  }
  if (groups.includes("mcp")) rows.push(...(await measureMcp(breaker)));
  rows.push(countRequests(upstream, sinceMs));
  await end(breaker.child);
  return rows;
}

async function measureMemory(): Promise<Row[]> {
  const breaker = await startBreaker(startUpstream());
  await Bun.sleep(SETTLE_IDLE_MS);
  const idle = readMemory(breaker.child);
  await measure(breaker, "status", { amount: String(MANY_ANSWERS) });
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

async function measureStart(): Promise<Row[]> {
  const upstream = startUpstream();
  const script = join(folder, "empty.ts");
  await Bun.write(script, "");
  const pairs = await measurePairs(STARTS, { ours: () => timeStart(upstream), other: () => timeEmpty(script) });
  const ours = FORMATS.ms(median(pairs.map((pair) => pair.ours)));
  const other = FORMATS.ms(median(pairs.map((pair) => pair.other)));
  const value = median(pairs.map((pair) => pair.ours - pair.other));
  const what = "start to first STATUS answered, above an empty script";
  return [{ what, ours, other, value, unit: "ms", floor: 100, aim: 40, better: "lower" }];
}

/** Gives the rows of a request and of an event through the gateway, above going straight. */
async function measureDelays(gateway: Server, openai: Openai): Promise<Row[]> {
  const requests = await measurePairs(GATEWAY_PAIRS, {
    ours: () => measure(gateway, "request", { upstream: openai }),
    other: () => measure(openai, "request"),
  });
  const amount = String(EVENTS);
  const events = await measurePairs(GATEWAY_PAIRS, {
    ours: () => measure(gateway, "events", { amount, upstream: openai }),
    other: () => measure(openai, "events", { amount }),
  });
  return [
    compareDelays(requests, { what: "gateway: a request, above going straight, p50", floor: 1, aim: 0.3 }),
    compareDelays(events, { what: "gateway: an event of a stream, above going straight, p50", floor: 0.3, aim: 0.1 }),
  ];
}

async function measureRate(gateway: Server, openai: Openai): Promise<Row[]> {
  const portkey = await orSkip("the row against Portkey", startPortkey(openai));
  if (!portkey) return [];
  const pairs = await measurePairs(GATEWAY_PAIRS, {
    ours: () => measure(gateway, "requests", { upstream: openai }),
    other: () => measure(portkey, "requests", { upstream: openai }),
  });
  await end(portkey.child);
  report("Gateway", pairs);
  const what = "gateway: requests, 32 at once, against Portkey";
  return [compare(pairs, { what, figure: "rate", floor: 3, aim: 6 })];
}

/** The most resident memory of a process while it is under a load, in bytes. */
async function findPeak(server: Server, kind: string): Promise<number> {
  let peak = 0;
  const timer = setInterval(() => (peak = Math.max(peak, readMemory(server.child))), SAMPLE_MS);
  await measure(server, kind, { amount: "1" }).finally(() => clearInterval(timer));
  return peak;
}

async function measureFiles(openai: Openai): Promise<Row[]> {
  const { breaker, gateway } = await startGateway(openai);
  await Bun.sleep(SETTLE_IDLE_MS);
  const idle = readMemory(breaker.child);
  const [up, down] = [await findPeak(gateway, "upload"), await findPeak(gateway, "download")];
  await end(breaker.child);
  const [peak, other] = [Math.max(up, down), `${FORMATS.mib(idle)} idle`];
  console.log(`Gateway: at most ${FORMATS.mib(up)} while a file goes up, ${FORMATS.mib(down)} down`);
  const figures = { ours: FORMATS.mib(peak), other, value: peak - idle, floor: 64 * MIB, aim: 32 * MIB };
  return [{ what: "gateway: memory, 100 MB up and down slowly, above idle", ...figures, unit: "mib", better: "lower" }];
}

async function measureGateway(): Promise<Row[]> {
  const openai = await startOpenai();
  const { breaker, gateway } = await startGateway(openai);
  const rows = [...(await measureDelays(gateway, openai)), ...(await measureRate(gateway, openai))];
  const { allowances } = await askInfo(breaker);
  if (allowances[0].used === 0) throw new Error("The gateway counts no tokens");
  await end(breaker.child);
  rows.push(...(await measureFiles(openai)));
  await end(openai.child);
  return rows;
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

async function measureAll(): Promise<Row[]> {
  const rows: Row[] = [];
  if (groups.includes("status") || groups.includes("mcp")) rows.push(...(await measureAnswers()));
  if (groups.includes("memory")) rows.push(...(await measureMemory()));
  if (groups.includes("start")) rows.push(...(await measureStart()));
  if (groups.includes("gateway")) rows.push(...(await measureGateway()));
  return rows;
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
