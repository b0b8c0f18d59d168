/// <reference types="bun-types" />
/**
 * Tests of breaker.ts: pure functions with tables, behaviour through real sockets, real processes and
 * real `pass`. Only the account is simulated, by an HTTP server on loopback that misbehaves as told.
 * A test that needs a program names it in its title and is skipped where it is missing.
 */
import { heapStats } from "bun:jsc";
import { afterAll, describe as suite, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import {
  chmodSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer, type IncomingHttpHeaders, type ServerResponse } from "node:http";
import { connect } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import {
  addEntries,
  AmountSchema,
  AnswerSchema,
  ask,
  askForUsage,
  computeBackoff,
  CostRowSchema,
  EVENTS,
  createLook,
  decide,
  describe as describeInfo,
  findQuestion,
  formatAmount,
  formatCheck,
  formatDay,
  formatHelp,
  type Info,
  LINE_COMMANDS,
  main,
  matchModels,
  mergeLook,
  type Options,
  parseArguments,
  parseRetryAfter,
  passHeaders,
  readBilling,
  type Reading,
  readJson,
  readMcp,
  readPage,
  redact,
  runProgram,
  screen,
  startGateway,
  startServer,
  startWatch,
  type Sums,
  type Surroundings,
  takeLine,
  UNSEEN,
  UsageError,
  UsageRowSchema,
  VERSION,
  type Watch,
  type World,
} from "./breaker.ts";

// ── Helpers ─────────────────────────────────────────────────────────────────────────────────────

// What is waited for has bounds of its own; the machine may be busy.
setDefaultTimeout(20_000);

const SCRIPT = join(import.meta.dir, "breaker.ts");
/** Another one in each run: the search for it must not find that of a run beside this one. */
const KEY = `sk-admin-T3stKeyThatNobodyMaySee${crypto.randomUUID().replaceAll("-", "")}`;
const DAY = 86_400_000;
const today = () => formatDay(Date.now());
const yesterday = () => formatDay(Date.now() - DAY);
const folders: string[] = [];

function makeFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "brk-"));
  folders.push(folder);
  return folder;
}

/**
 * Kills what is left of the tests' processes when the tests are over, however they end (also by ^C, --bail or
 * kill -9): its stdin closes then.
 */
const SWEEP = '/^-/ { delete pids[substr($0, 2)]; next } { pids[$0] } END { for (pid in pids) system("kill -9 " pid) }';
const sweeper = Bun.spawn(["sh", "-c", `trap '' INT TERM HUP; exec awk '${SWEEP}'`], {
  stdin: "pipe",
  stdout: "ignore",
  stderr: "ignore",
});
sweeper.unref();

/** Leaves a process to the sweeper. */
function leash<Child extends Bun.Subprocess>(child: Child): Child {
  const tell = (text: string) => {
    sweeper.stdin.write(`${text}\n`);
    void sweeper.stdin.flush();
  };
  tell(String(child.pid));
  void child.exited.then(() => tell(`-${child.pid}`));
  return child;
}

afterAll(() => {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

/** Waits until `check` gives something, for `limitMs` at most. */
async function until<T>(check: () => T | Promise<T>, limitMs = 8000): Promise<NonNullable<T>> {
  const endMs = performance.now() + limitMs;
  for (;;) {
    const found = await check();
    if (found) return found;
    if (performance.now() > endMs) throw new Error(`not within ${limitMs} ms: ${check}`);
    await Bun.sleep(10);
  }
}

/** Some tests need /proc, /dev/full, setsid, util-linux or the whole of 127.0.0.0/8. */
const isLinux = process.platform === "linux";

function needsLinux(...programs: string[]) {
  return test.skipIf(!isLinux || programs.some((program) => Bun.which(program) === null));
}

function needs(...programs: string[]) {
  return test.skipIf(programs.some((program) => Bun.which(program) === null));
}

function optionsOf(...argv: string[]): Options {
  const call = parseArguments(argv, {});
  if (call.command === "print") throw new Error("no options");
  return call.options;
}

/** The raw HTTP answer that holds `body`; without a Date unless one is given. */
function http(
  body: unknown,
  { status = 200, headers = {} }: { status?: number; headers?: Record<string, string> } = {},
): string {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  const lines = Object.entries({ "Content-Length": String(Buffer.byteLength(text)), Connection: "close", ...headers });
  return `HTTP/1.1 ${status} X\r\n${lines.map(([name, value]) => `${name}: ${value}\r\n`).join("")}\r\n${text}`;
}

interface Request {
  path: string;
  query: URLSearchParams;
  headers: Headers;
}

type Respond = (request: Request, socket: Bun.Socket<{ text: string }>) => string | null;

/** A simulated account: `respond` gives the raw answer to each request, or null to leave it hanging. */
function startAccount(respond: Respond) {
  const requests: Request[] = [];
  const listener = Bun.listen<{ text: string }>({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      open(socket) {
        socket.data = { text: "" };
      },
      data(socket, chunk) {
        socket.data.text += chunk.toString();
        if (!socket.data.text.includes("\r\n\r\n")) return;
        const [first = "", ...lines] = socket.data.text.split("\r\n");
        const url = new URL(first.split(" ")[1] ?? "", "http://account");
        const headers = new Headers(
          lines
            .filter((line) => line.includes(": "))
            .map((line): [string, string] => {
              const at = line.indexOf(": ");
              return [line.slice(0, at), line.slice(at + 2)];
            }),
        );
        const [, body = ""] = socket.data.text.split("\r\n\r\n", 2);
        if (body.length < Number(headers.get("content-length") ?? 0)) return;
        socket.data.text = "";
        const request = { path: url.pathname, query: url.searchParams, headers };
        requests.push(request);
        const answer = respond(request, socket);
        if (answer === null) return;
        socket.write(answer);
        socket.end();
      },
      error() {},
    },
  });
  return {
    requests,
    base: `http://127.0.0.1:${listener.port}/v1`,
    [Symbol.dispose]: () => listener.stop(true),
  };
}

/** An account that costs nothing, and says so only once it is released. */
function startHeldAccount() {
  let held: Bun.Socket<{ text: string }> | null = null;
  const account = startAccount((_, socket) => {
    held = socket;
    return null;
  });
  const release = () => {
    held?.write(FREE);
    held?.end();
  };
  return { ...account, release };
}

interface Amount {
  value?: unknown;
  currency?: unknown;
}

/** A bucket of the Costs API `daysAgo` days before today. */
function bucket(daysAgo: number, ...amounts: (number | string | Amount)[]) {
  const start_time = Date.parse(formatDay(Date.now() - daysAgo * DAY)) / 1000;
  const results = amounts.map((amount) => ({
    object: "organization.costs.result",
    amount: typeof amount === "object" ? amount : { value: amount, currency: "usd" },
  }));
  return { object: "bucket", start_time, end_time: start_time + 86400, results };
}

function page(data: unknown, next: string | null = null) {
  return { object: "page", data, has_more: next !== null, next_page: next };
}

function usage(...rows: { model: string | null; input: number; output: number; cached?: number }[]) {
  const start_time = Date.parse(today()) / 1000;
  const results = rows.map(({ model, input, output, cached }) => ({
    object: "organization.usage.completions.result",
    input_tokens: input,
    output_tokens: output,
    input_cached_tokens: cached ?? 0,
    num_model_requests: 1,
    model,
  }));
  return page([{ object: "bucket", start_time, end_time: start_time + 86400, results }]);
}

const FREE = http(page([bucket(1, 0), bucket(0, "0E-6176")]));
const CENT = http(page([bucket(1, 0), bucket(0, "0.01")]));

async function* linesOf(text: string): AsyncGenerator<string> {
  yield* text.replace(/\n$/, "").split("\n");
}

/** What a command line has around it within this process. */
function surround(given: Partial<Surroundings> = {}): Surroundings {
  return {
    env: { OPENAI_ADMIN_KEY: KEY, PATH: process.env["PATH"] },
    now: Date.now,
    lines: linesOf(""),
    print: async () => {},
    log: () => {},
    isColoured: false,
    ...given,
  };
}

/** Runs a command line of the breaker within this process. */
async function run(argv: string[], { env = {}, stdin = "" }: { env?: Record<string, string>; stdin?: string } = {}) {
  let [out, err] = ["", ""];
  const around = surround({
    lines: linesOf(stdin),
    print: async (text) => void (out += text),
    log: (text) => void (err += `${text}\n`),
  });
  const code = await main(argv, { ...around, env: { ...around.env, ...env } });
  return { code, out, err };
}

/** A breaker that serves within this process, at a free port. */
async function serve(
  argv: string[],
  { env = {}, now = Date.now }: { env?: Record<string, string>; now?: () => number } = {},
) {
  const logs: string[] = [];
  const around = surround({ now, log: (text) => void logs.push(text) });
  const argvOfServer = ["serve", "--host", "127.0.0.1", "--port", "0", ...argv];
  const done = main(argvOfServer, { ...around, env: { ...around.env, ...env } });
  const port = await until(() => Number(/listens on \S+:(\d+)/.exec(logs.join("\n"))?.[1]));
  const address = { host: "127.0.0.1", port, timeoutMs: 5000 };
  return {
    port,
    logs,
    done,
    ask: (question: string) => ask(question, address),
    info: async (): Promise<Info> => JSON.parse(await ask("INFO", address)),
    async [Symbol.asyncDispose]() {
      process.emit("SIGTERM", "SIGTERM");
      expect(await done).toBe(0);
    },
  };
}

/** A breaker in a process of its own, at a free port. */
async function spawnBreaker(
  argv: string[],
  {
    env = {},
    script = SCRIPT,
    cwd = makeFolder(),
    wrap = [],
  }: { env?: Record<string, string>; script?: string; cwd?: string; wrap?: string[] } = {},
) {
  const child = leash(
    Bun.spawn([...wrap, process.execPath, "--no-env-file", script, "--host", "127.0.0.1", "--port", "0", ...argv], {
      env: { PATH: process.env["PATH"], HOME: process.env["HOME"], ...env },
      cwd,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    }),
  );
  let log = "";
  void (async () => {
    for await (const chunk of child.stderr.pipeThrough(new TextDecoderStream())) log += chunk;
  })();
  const port = await until(() => Number(/listens on \S+:(\d+)/.exec(log)?.[1]));
  const address = { host: "127.0.0.1", port, timeoutMs: 8000 };
  return {
    port,
    pid: child.pid,
    child,
    log: () => log,
    ask: (question: string) => ask(question, address),
    info: async (): Promise<Info> => JSON.parse(await ask("INFO", address)),
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      const timer = setTimeout(() => child.kill("SIGKILL"), 4000);
      await child.exited;
      clearTimeout(timer);
    },
  };
}

/** Runs a shell command to its end. */
async function sh(
  command: string,
  env: Record<string, string> = {},
): Promise<{ code: number; out: string; err: string }> {
  const child = leash(
    Bun.spawn(["bash", "-c", command], {
      env: { ...process.env, ...env },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    }),
  );
  const [out, err] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  return { code: await child.exited, out, err };
}

/** Sends pieces over one connection, half-closes, and gives all that comes back until the server closes. */
function talk(
  port: number,
  pieces: (string | Uint8Array)[],
  { close = true }: { close?: boolean } = {},
): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect({ port, host: "127.0.0.1", allowHalfOpen: true });
    let text = "";
    socket.setTimeout(15_000, () => reject(new Error(`nothing more after ${JSON.stringify(text)}`)));
    socket.on("data", (chunk) => (text += chunk));
    socket.on("end", () => {
      resolve(text);
      socket.end();
    });
    socket.on("error", reject);
    socket.on("connect", async () => {
      for (const piece of pieces) {
        socket.write(piece);
        if (pieces.length > 1) await Bun.sleep(1);
      }
      if (close) socket.end();
    });
  });
}

/** What a server needs that runs in this process, and ends by `stop`. */
function prepareWorld(argv: string[], { now = Date.now, look = async () => ({ ...UNSEEN, asOfMs: now() }) } = {}) {
  const stop = new AbortController();
  const world: World = {
    ...surround({ now }),
    options: optionsOf(...argv),
    ...{ rest: [], self: { startedMs: 0, gateway: null, keys: [] }, stop: () => stop.abort(), signal: stop.signal },
  };
  const watch = startWatch(world, { look, onAnswer: () => {} });
  watch.hurry();
  return { world, watch, stop };
}

/** The memory of a process that is resident, or that was at most, in KiB. */
function measureKib(pid: number, when: "now" | "most" = "now"): number {
  const form = when === "now" ? /VmRSS:\s+(\d+)/ : /VmHWM:\s+(\d+)/;
  return Number(form.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
}

/** Gives what `work` gives; fails where that took `limitMs` or more. */
async function within<T>(limitMs: number, work: () => T | Promise<T>): Promise<T> {
  const startMs = performance.now();
  const result = await work();
  expect(performance.now() - startMs).toBeLessThan(limitMs);
  return result;
}

// ── Options ─────────────────────────────────────────────────────────────────────────────────────

suite("options", () => {
  test("a limit in millions is a whole number of tokens", () => {
    expect(optionsOf("--source", "costs", "--allowance", "*=2.007M").allowances).toEqual([
      { models: "*", limit: 2007000 },
    ]);
  });

  test("the defaults are those of the table", () => {
    expect(optionsOf()).toEqual({
      host: "0.0.0.0",
      port: 5555,
      thresholdUsd: 0,
      allowances: [],
      projects: [],
      intervalMs: 60_000,
      timeoutMs: 10_000,
      maxAgeMs: 600_000,
      whenUnknown: true,
      source: "auto",
      baseUrl: "https://api.openai.com/v1",
      passEntry: "OPENAI_API_KEY",
      onTrip: "",
      onReset: "",
      gateway: "",
      drill: false,
      json: false,
    });
  });

  const accepted: [string[], Record<string, string>, Partial<Options>][] = [
    [["--port", "0"], {}, { port: 0 }],
    [["--port=8080"], {}, { port: 8080 }],
    [[], { BREAKER_PORT: "7" }, { port: 7 }],
    [["--port", "8"], { BREAKER_PORT: "7" }, { port: 8 }],
    [["--port", "8"], { BREAKER_PORT: "nonsense" }, { port: 8 }],
    [["--port", "8", "--port", "9"], {}, { port: 9 }],
    [[], { BREAKER_PORT: "" }, { port: 5555 }],
    [["--threshold", "0.5"], {}, { thresholdUsd: 0.5 }],
    [["--threshold", ".5"], {}, { thresholdUsd: 0.5 }],
    [["--interval", "500ms"], {}, { intervalMs: 500 }],
    [["--timeout", "30s", "--max-age", "1h"], {}, { timeoutMs: 30_000, maxAgeMs: 3_600_000 }],
    [["--max-age", "24h"], {}, { maxAgeMs: 86_400_000 }],
    [[], { BREAKER_MAX_AGE: "10m" }, { maxAgeMs: 600_000 }],
    [["--when-unknown", "false"], {}, { whenUnknown: false }],
    [["--drill"], {}, { drill: true, intervalMs: 1000 }],
    [[], { BREAKER_DRILL: "true" }, { drill: true, intervalMs: 1000 }],
    [["--drill", "--interval", "5s"], {}, { drill: true, intervalMs: 5000 }],
    [["--base-url", "http://127.0.0.1:9/v1/"], {}, { baseUrl: "http://127.0.0.1:9/v1" }],
    [["--base-url", "http://[::1]:9"], {}, { baseUrl: "http://[::1]:9" }],
    [["--base-url", "http://localhost:9/v1"], {}, { baseUrl: "http://127.0.0.1:9/v1" }],
    [["--base-url", "http://LocalHost:9"], {}, { baseUrl: "http://127.0.0.1:9" }],
    [["--host", "localhost"], {}, { host: "127.0.0.1" }],
    [[], { BREAKER_HOST: "LOCALHOST" }, { host: "127.0.0.1" }],
    [["--base-url", "https://gateway.example/v1"], {}, { baseUrl: "https://gateway.example/v1" }],
    [["--project", "a", "--project", "b"], {}, { projects: ["a", "b"] }],
    [[], { BREAKER_PROJECT: " a  b " }, { projects: ["a", "b"] }],
    [["--project", "c"], { BREAKER_PROJECT: "a b" }, { projects: ["c"] }],
    [
      [],
      { BREAKER_ALLOWANCE: "*-mini*,*-nano*=10M *=1M" },
      {
        allowances: [
          { models: "*-mini*,*-nano*", limit: 1e7 },
          { models: "*", limit: 1e6 },
        ],
      },
    ],
    [["--allowance", "a=250k"], {}, { allowances: [{ models: "a", limit: 250_000 }] }],
    [["--allowance", "a=2.5M"], {}, { allowances: [{ models: "a", limit: 2_500_000 }] }],
    [["--allowance", "a=1G"], {}, { allowances: [{ models: "a", limit: 1e9 }] }],
    [["--allowance", "a=7"], {}, { allowances: [{ models: "a", limit: 7 }] }],
    [["--on-trip", "echo a; echo b"], {}, { onTrip: "echo a; echo b" }],
    [["--on-trip="], { BREAKER_ON_TRIP: "x" }, { onTrip: "" }],
  ];
  test.each(accepted)("%j with %j", (argv, env, expected) => {
    const call = parseArguments(argv, env);
    expect(call).toMatchObject({ command: "serve", options: expected });
  });

  const refused: [string[], Record<string, string>, RegExp][] = [
    [["--port", "65536"], {}, /^--port "65536": expected a port/],
    [["--port", "-1"], {}, /^--port "-1": expected a port/],
    [["--port", "1.5"], {}, /^--port "1.5": expected a port/],
    [["--port", ""], {}, /^--port "": expected a port/],
    [["--port"], {}, /^--port: expected a port .* after it/],
    [["--port", "--json"], {}, /^--port: expected a port .* after it/],
    [[], { BREAKER_PORT: "x" }, /^BREAKER_PORT "x": expected a port/],
    [["--threshold", "-1"], {}, /^--threshold "-1": expected an amount/],
    [["--threshold", "NaN"], {}, /^--threshold "NaN"/],
    [["--threshold", "1e999"], {}, /^--threshold/],
    [["--interval", "0ms"], {}, /^--interval "0ms": expected a duration from 1ms to 24h/],
    [["--interval", "60"], {}, /^--interval "60": expected a duration/],
    [["--max-age", "25h"], {}, /^--max-age "25h"/],
    [["--when-unknown", "maybe"], {}, /^--when-unknown "maybe": expected true or false/],
    [["--source", "x"], {}, /^--source "x": expected auto, costs or billing/],
    [["--base-url", "http://example.com/v1"], {}, /^--base-url "http:\/\/example.com\/v1": expected an https URL/],
    [["--base-url", "http://127.0.0.1.example.com/"], {}, /^--base-url/],
    [["--base-url", "http://localhost.example.com/"], {}, /^--base-url/],
    [["--base-url", "https://user:secret@example.com/"], {}, /^--base-url/],
    [["--base-url", "file:///etc/passwd"], {}, /^--base-url/],
    [["--base-url", "nonsense"], {}, /^--base-url/],
    [["--base-url", "https://example.com/v1?"], {}, /^--base-url "https:\/\/example.com\/v1\?": expected an https URL/],
    [["--base-url", "https://example.com/v1#"], {}, /^--base-url "https:\/\/example.com\/v1#": expected an https URL/],
    [["--base-url", "https://example.com/v1?a=b"], {}, /^--base-url/],
    [[], { BREAKER_BASE_URL: "https://example.com/v1?#" }, /^BREAKER_BASE_URL/],
    [["--pass-entry", ""], {}, /^--pass-entry "": expected the name/],
    [["--pass-entry", "a\nb"], {}, /^--pass-entry "a\\nb"/],
    [["--pass-entry", KEY], {}, /^--pass-entry "sk-.*": expected the name in pass/],
    [["--host", "a b"], {}, /^--host "a b"/],
    [["--allowance", "x"], {}, /^--allowance "x": expected MODELS=TOKENS/],
    [["--allowance", "=5"], {}, /^--allowance "=5"/],
    [["--allowance", "\u200b*=5"], {}, /^--allowance/],
    [["--allowance", "a=0"], {}, /^--allowance "a=0"/],
    [["--allowance", "a=5T"], {}, /^--allowance "a=5T"/],
    [["--allowance", "a=-5"], {}, /^--allowance "a=-5"/],
    [["--allowance", "a,,b=5"], {}, /^--allowance "a,,b=5"/],
    [["--allowance", "a=1M", "--allowance", "b=zz"], {}, /^--allowance "b=zz"/],
    [[], { BREAKER_ALLOWANCE: "a=1M b" }, /^BREAKER_ALLOWANCE "b"/],
    [["--allowance", "a=1", "--source", "billing"], {}, /^--allowance.*--source costs/],
    [["--project", "proj_a,proj_b"], {}, /^--project "proj_a,proj_b": expected a project ID/],
    [["--project", "proj_a\u200b"], {}, /^--project /],
    [[], { BREAKER_PROJECT: '"proj_a"' }, /^BREAKER_PROJECT /],
    [["--project", "p", "--base-url", "https://gateway.example"], {}, /^--project "p".*--source costs/],
    [["--prot", "1"], {}, /^--prot: no such option/],
    [["-x"], {}, /^-x: no such option/],
    [["--__proto__=1"], {}, /^--__proto__: no such option/],
    [["--__proto__", "1"], {}, /^--__proto__: no such option/],
    [["--constructor=1"], {}, /^--constructor: no such option/],
    [["--no-drill"], {}, /^--no-drill: no such option/],
    [["stop", "-p", "1"], {}, /^-p: no such option/],
    [["nonsense"], {}, /^nonsense: expected a command/],
    [["check", "more"], {}, /^more: expected nothing more after check/],
    [["exec"], {}, /^exec: expected exec -- CMD/],
    [["exec", "--"], {}, /^exec: expected exec -- CMD/],
    [["check", "--", "x"], {}, /^check: expected exec -- CMD/],
  ];
  test.each(refused)("%j with %j is refused in one line", (argv, env, expected) => {
    const refuse = () => parseArguments(argv, env);
    expect(refuse).toThrow(UsageError);
    expect(refuse).toThrow(expected);
    expect(refuse).toThrow(/^[^\n]*--help$/);
  });

  test("help and version win over everything before --", async () => {
    expect(await run(["--nonsense", "-h"])).toEqual({ code: 0, out: formatHelp(), err: "" });
    expect(await run(["--port", "x", "--version"])).toEqual({ code: 0, out: `${VERSION}\n`, err: "" });
    expect(parseArguments(["exec", "--", "ls", "--help"], {})).toMatchObject({
      command: "exec",
      rest: ["ls", "--help"],
    });
  });

  test("help names every option with its default", () => {
    const names = formatHelp().match(/--[a-z-]+/g) ?? [];
    for (const name of [
      "host",
      "port",
      "threshold",
      "allowance",
      "project",
      "interval",
      "timeout",
      "max-age",
      "when-unknown",
      "source",
      "base-url",
      "pass-entry",
      "on-trip",
      "on-reset",
      "drill",
      "json",
    ]) {
      expect(names).toContain(`--${name}`);
    }
    expect(formatHelp()).toContain("[https://api.openai.com/v1]");
  });

  test("a usage error goes to stderr and exits with 64", async () => {
    const { code, out, err } = await run(["--port", "x"]);
    expect([code, out]).toEqual([64, ""]);
    expect(err).toBe('breaker: --port "x": expected a port from 0 to 65535; see --help\n');
  });
});

// ── Money and time ──────────────────────────────────────────────────────────────────────────────

suite("amounts", () => {
  const amounts: [unknown, number | null][] = [
    [0, 0],
    [0.4, 0.4],
    [-1, -1],
    ["12.50", 12.5],
    ["0E-6176", 0],
    ["0.000", 0],
    ["0.003627500000000000000000000000000000", 0.0036275],
    ["0.1739150000000000000000000000", 0.173915],
    ["+1", 1],
    [".5", 0.5],
    ["1e2", 100],
    ["1E-6176", 1e-300],
    ["-1E-6176", -0],
    [Number.MIN_VALUE, 1e-300],
    ["", null],
    [" ", null],
    [null, null],
    [undefined, null],
    [Number.NaN, null],
    [Number.POSITIVE_INFINITY, null],
    ["Infinity", null],
    ["1e999", null],
    [1e15, 1e15],
    [1.7e308, null], // Two of them are Infinity.
    ["-1.7e308", null],
    ["NaN", null],
    ["0x10", null],
    ["1,5", null],
    ["1 usd", null],
    [true, null],
    [[], null],
    [{}, null],
  ];
  test.each(amounts)("%p is read as %p", (value, expected) => {
    expect(AmountSchema.safeParse(value).data ?? null).toBe(expected);
  });

  test.each([
    [0.1 + 0.2, "0.3"],
    [0.0036275, "0.0036275"],
    [0, "0"],
    [20, "20"],
    [1e-9, "1e-9"],
  ])("%p is shown as %p", (amount, text) => {
    expect(formatAmount(amount)).toBe(text);
  });
});

suite("globs", () => {
  const globs: [string, string, boolean][] = [
    ["*", "gpt-5", true],
    ["*", "", true],
    ["gpt-5", "gpt-5", true],
    ["gpt-5", "gpt-5-mini", false],
    ["gpt-5*", "gpt-5-mini", true],
    ["*-mini*", "gpt-4o-mini-2024-07-18", true],
    ["*-mini*,*-nano*", "gpt-5-nano", true],
    ["o?", "o3", true],
    ["o?", "o", false],
    ["o?", "o33", false],
    ["GPT-5", "gpt-5", false],
    ["gpt.5", "gptx5", false],
    ["gpt-(5)+", "gpt-(5)+", true],
    ["[ab]", "a", false],
    ["a*c", "a\nc", true],
    ["*a*b", "xaxbxb", true],
    ["a*b*c", "abcb", false],
    ["*a*a*a*a*a*a*a*a*b", "a".repeat(256), false],
    ["*-*-*-*-*-*x", "-".repeat(256), false],
    ["**", "", true],
    ["a**", "a", true],
  ];
  test.each(globs)("%p on %p: %p", (patterns, model, expected) => {
    expect(matchModels(patterns)(model)).toBe(expected);
  });
});

test.each([
  ["5", 5000],
  ["0", 0],
  ["7200", 3_600_000],
  ["nonsense", 0],
  ["-5", 0],
  [null, 0],
  ["Thu, 01 Jan 1970 00:00:30 GMT", 20_000],
])("Retry-After %p is %p ms", (header, expected) => {
  expect(parseRetryAfter(header, 10_000)).toBe(expected);
});

test.each([
  [1, 60_000, 0, 5000],
  [2, 60_000, 0, 10_000],
  [4, 60_000, 0, 40_000],
  [9, 60_000, 0, 300_000],
  [5000, 60_000, 0, 300_000],
  [1, 1000, 0, 1000],
  [2, 1000, 0, 2000],
  [1, 60_000, 90_000, 90_000],
  [1, 60_000, 1000, 5000],
])(
  "after %p failures, an interval of %p ms and Retry-After %p ms the next look is in %p ms",
  (failures, intervalMs, retryAfterMs, expected) => {
    expect(computeBackoff(failures, { intervalMs, retryAfterMs })).toBe(expected);
  },
);

test.each([
  [`Incorrect key: ${KEY}`, "Incorrect key: sk-***"],
  ["provided: sk-other-abc***xyz, again", "provided: sk-*** again"],
  ["two\nlines\x1b[31m\0", "two lines [31m "],
  ["from right to\u202eleft", "from right toleft"],
  [`sk-admin\u200b-${"k".repeat(9)}\u2060${"k".repeat(9)}`, "sk-***"],
  ["a task-list on disk-0 is nothing secret", "a task-list on disk-0 is nothing secret"],
  [`of the model osk-admin-${"k".repeat(40)}`, "of the model osk-***"],
  ["x".repeat(5000), `${"x".repeat(300)}…`],
])("%j is redacted", (text, expected) => {
  expect(redact(text)).toBe(expected);
});

test("a secret is redacted also where letters that are not seen stand within it", () => {
  expect(redact("of the model a\u200bb\ufeffc\u00adde", ["abcd"])).toBe("of the model sk-***");
});

const digits = "1".repeat(2 ** 20);
const blanks = " ".repeat(2 ** 20);
const start_time = Date.parse("2026-11-22") / 1000;
const rows = (results: unknown[]) => readPage(page([{ start_time, results }]), CostRowSchema);
/** Texts with the same hash in Bun (rapidhash, seed 0): 20,000 of them took `JSON.parse` 2 s. */
const meeting = Array.from(
  { length: 20_000 },
  (_, i) => `"\xc2\x93K\xc2\xb8\xc2\x8b${String(i).padStart(8)}\xc3\x89\xc2\xac.\xc2\x96"`,
);
const listMembers = (length: number) => `{${Array.from({ length }, (_, i) => `"x${i}":0`).join(",")}}`;
const [members, allMembers] = [listMembers(100_000), listMembers(700_000)];
const allItems = JSON.stringify(Array.from({ length: 1_000_000 }, (_, i) => i.toString(36)));
const deepWish = `{"stream":true,"x":{"stream_options":null},"stream_options":{"x":${"[".repeat(50_000)}${"]".repeat(50_000)}}}`;
const models = Array.from({ length: 21_000 }, (_, i) => ({ day: "2026-11-22", amount: 1, model: `x${i}` }));
const manyGlobs = optionsOf(
  "--source",
  "costs",
  ...Array.from({ length: 50 }, (_, i) => ["--allowance", `a${i}*=1`]).flat(),
);
const crowd = new Headers({ connection: Array.from({ length: 150_000 }, (_, i) => `x${i + 1e5}`).join(",") });
for (let i = 0; i < 240; i++) crowd.set(`x${i}`.padEnd(7, "x"), "");
const hostile: [string, () => unknown][] = [
  ["digits and a letter", () => AmountSchema.safeParse(`${digits}x`)],
  ["digits, a point, digits and a letter", () => AmountSchema.safeParse(`${digits}.${digits}x`)],
  ["zeros that are no exponent", () => AmountSchema.safeParse(`0.${"0".repeat(2 ** 20)}e-1`)],
  ["an exponent", () => AmountSchema.safeParse(`1e${digits}x`)],
  ["a sentence", () => redact(`sk-${blanks}x`)],
  ["keys", () => redact("sk-".repeat(2 ** 19))],
  ["Retry-After", () => parseRetryAfter(`${digits}${blanks}x`, 0)],
  ["blanks around a command", () => findQuestion(`${blanks}STATUS${blanks}x`, { isLocal: () => true })],
  ["a message of MCP", () => readMcp(`{"jsonrpc":"2.0","id":"${digits}","method":"${blanks}"`)],
  ["members of an object of MCP", () => readMcp(`{"jsonrpc":"2.0","id":1,"method":"ping","params":${members}}`)],
  ["lists in lists of an answer", () => readJson("[".repeat(2 ** 23))],
  ["members named by an index", () => askForUsage(`{"stream":true,"a":[${'{"999":0},'.repeat(190_000)}0]}`)],
  ["members named by an index, escaped", () => readJson(`[${'{"9\\u0039\\u00399":0},'.repeat(190_000)}0]`)],
  ["names that meet in one place of a table", () => readJson(`{${meeting.map((text) => `${text}:0`).join()}}`)],
  ["texts that meet in one place of a table", () => readJson(`[${meeting.join()}]`)],
  ["texts that meet again and again", () => readJson(`[${Array(50).fill(meeting.slice(0, 1990).join()).join()}]`)],
  ["texts, beside colons", () => readJson(":".repeat(3000) + '"'.repeat(2 ** 23))],
  ["escaped letters of a text, beside colons", () => readJson(`${":".repeat(3000)}"${"\\\\".repeat(2 ** 22)}`)],
  ["digits that name no member", () => readJson('"1'.repeat(2 ** 22))],
  ["digits in a text", () => readJson(`"${"1".repeat(2 ** 23)}"`)],
  ["members of an answer", () => readJson(allMembers)],
  ["items of an answer", () => readJson(allItems)],
  [
    "items in a wish of a stream",
    () => askForUsage(`{"stream":true,"x":{"stream_options":{}},"stream_options":{"x":${allItems}}}`),
  ],
  ["lists in lists in a wish of a stream", () => askForUsage(deepWish)],
  ["names in Connection", () => passHeaders(crowd)],
  ["events, to find the first,", () => "a\n\n".repeat(2_700_000).matchAll(EVENTS).next()],
  ["models for 50 globs", () => addEntries({}, models, { now: 0, options: manyGlobs })],
  ["wishes of a stream", () => askForUsage(`{"stream":true,"stream_options":${members}}`)],
  ["a cursor", () => readPage({ data: [], has_more: true, next_page: digits }, CostRowSchema)],
  ["bad rows", () => rows(Array(500_000).fill(0))],
  ["bad buckets", () => readPage(page(Array(500_000).fill(0)), CostRowSchema)],
  ["bad days", () => readBilling({ total_usage: 0, daily_costs: Array(500_000).fill(0) }, "2026-11-22")],
];
test.each(hostile)("a lot of %s takes no long time to read", (_, read) => {
  // The fastest of three: the machine may be busy.
  const times = [1, 2, 3].map(() => {
    const startMs = performance.now();
    read();
    return performance.now() - startMs;
  });
  expect(Math.min(...times)).toBeLessThan(400);
});

// ── The account's answers ───────────────────────────────────────────────────────────────────────

suite("pages and billing", () => {
  const day = Date.parse("2026-11-22") / 1000;
  const row = { amount: { value: 1, currency: "usd" } };
  test("a good row counts also when its neighbour is bad", () => {
    const body = page([
      { start_time: day, results: [{}, row] },
      { start_time: "x", results: [row] },
      { start_time: day, results: [row] },
    ]);
    const { entries, problem } = readPage(body, CostRowSchema);
    expect(entries).toHaveLength(2);
    expect(problem).toBe("start_time: Invalid input: expected number, received string");
  });
  test("rows count although the page does not say whether more follow", () => {
    const { entries, problem } = readPage({ data: [{ start_time: day, results: [row] }] }, CostRowSchema);
    expect(entries).toHaveLength(1);
    expect(problem).toContain("has_more");
  });

  const billing: [string, unknown, [string, number][], boolean][] = [
    ["a total alone is booked on today", { total_usage: 42 }, [["2026-11-23", 0.42]], true],
    ["0.4 cents are a cost", { total_usage: 0.4 }, [["2026-11-23", 0.004]], true],
    ["nothing", { total_usage: 0, daily_costs: [] }, [], true],
    ["no total", { daily_costs: [] }, [], false],
    ["a total that is null", { total_usage: null }, [], false],
    [
      "days that add up to the total",
      {
        total_usage: 106.619,
        daily_costs: [
          {
            timestamp: day,
            line_items: [
              { name: "a", cost: 0 },
              { name: "b", cost: 106.619 },
            ],
          },
        ],
      },
      [
        ["2026-11-22", 0],
        ["2026-11-22", 1.06619],
      ],
      true,
    ],
    [
      "what the total holds above the days",
      { total_usage: 3, daily_costs: [{ timestamp: day, line_items: [{ cost: 1 }] }] },
      [
        ["2026-11-22", 0.01],
        ["2026-11-23", 0.02],
      ],
      true,
    ],
    [
      "a credit hides no cost",
      { total_usage: 0, daily_costs: [{ timestamp: day, line_items: [{ cost: -5 }, { cost: 5 }] }] },
      [
        ["2026-11-22", -0.05],
        ["2026-11-22", 0.05],
      ],
      true,
    ],
    [
      "a bad item beside a good one",
      { total_usage: 1, daily_costs: [{ timestamp: day, line_items: [{}, { cost: 1 }] }] },
      [["2026-11-22", 0.01]],
      false,
    ],
    [
      "milliseconds for seconds",
      { total_usage: 0, daily_costs: [{ timestamp: day * 1000, line_items: [] }] },
      [],
      false,
    ],
    ["days that are no list", { total_usage: 0, daily_costs: {} }, [], false],
    [
      "a total beside costs and credits that cancel out",
      { total_usage: 50, daily_costs: [{ timestamp: day, line_items: [{ cost: 100 }, { cost: -100 }] }] },
      [
        ["2026-11-22", 1],
        ["2026-11-22", -1],
        ["2026-11-23", 0.5],
      ],
      true,
    ],
    [
      "days that cost more than the total",
      { total_usage: 50, daily_costs: [{ timestamp: day - 5 * 86400, line_items: [{ cost: 100 }] }] },
      [["2026-11-17", 1]],
      false,
    ],
    [
      "days that cost more than the total by the rounding of a sum",
      { total_usage: 30, daily_costs: [{ timestamp: day, line_items: [{ cost: 10 }, { cost: 20.000000000001 }] }] },
      [
        ["2026-11-22", 0.1],
        ["2026-11-22", 0.2],
      ],
      true,
    ],
    ["a total too small for a number", { total_usage: "1E-6176" }, [["2026-11-23", 0]], true],
    ["a total below 0", { total_usage: -1 }, [], false],
    [
      "a total below 0 beside a day",
      { total_usage: -1, daily_costs: [{ timestamp: day, line_items: [{ cost: 1 }] }] },
      [["2026-11-22", 0.01]],
      false,
    ],
  ];
  test.each(billing)("%s", (_, body, expected, good) => {
    const { entries, problem } = readBilling(body, "2026-11-23");
    const booked = entries.map(({ day, amount }): [string, number] => [day, Number(amount.toFixed(9))]);
    expect(booked).toEqual(expected);
    expect(problem === null).toBe(good);
  });
});

// ── The decision ────────────────────────────────────────────────────────────────────────────────

suite("the decision", () => {
  const noon = Date.parse("2026-11-22T12:00:00Z");
  const minute = 60_000;
  const seen = (sums: Sums, more: Partial<Reading> = {}): Reading => ({ ...UNSEEN, asOfMs: noon, sums, ...more });
  const none = { "2026-11-21": 0, "2026-11-22": 0 };
  const tokens = ["--source", "costs", "--allowance", "*-mini=100", "--allowance", "*=10"];
  const decisions: [string, number, Reading, string[], string][] = [
    ["nothing seen", noon, UNSEEN, [], "TRUE unknown"],
    ["nothing seen, FALSE when unknown", noon, UNSEEN, ["--when-unknown", "false"], "FALSE unknown"],
    ["no cost", noon, seen(none), [], "FALSE none"],
    ["a cost today", noon, seen({ ...none, "2026-11-22": 0.000001 }), [], "TRUE cost"],
    ["a cost yesterday", noon, seen({ ...none, "2026-11-21": 5 }), [], "TRUE cost"],
    ["a cost of the day before yesterday", noon, seen({ ...none, "2026-11-20": 5 }), [], "FALSE none"],
    ["a cost of tomorrow: the clock is behind", noon, seen({ ...none, "2026-11-23": 5 }), [], "TRUE cost"],
    ["the smallest cost", noon, seen({ ...none, "2026-11-22": Number.MIN_VALUE }), [], "TRUE cost"],
    ["exactly the threshold", noon, seen({ ...none, "2026-11-22": 1 }), ["--threshold", "1"], "FALSE none"],
    ["above the threshold", noon, seen({ ...none, "2026-11-22": 1.01 }), ["--threshold", "1"], "TRUE cost"],
    [
      "both days together above the threshold",
      noon,
      seen({ "2026-11-21": 0.6, "2026-11-22": 0.6 }),
      ["--threshold", "1"],
      "TRUE cost",
    ],
    ["a cost, FALSE when unknown", noon, seen({ "2026-11-22": 1 }), ["--when-unknown", "false"], "TRUE cost"],
    ["a reading of exactly --max-age", noon + 10 * minute, seen(none), [], "FALSE none"],
    ["a reading older than --max-age", noon + 10 * minute + 1, seen(none), [], "TRUE unknown"],
    [
      "an old reading, FALSE when unknown",
      noon + 11 * minute,
      seen(none),
      ["--when-unknown", "false"],
      "FALSE unknown",
    ],
    ["a reading a little in the future", noon - 10 * minute, seen(none), [], "FALSE none"],
    ["a reading far in the future", noon - 10 * minute - 1, seen(none), [], "TRUE unknown"],
    ["an old reading with a cost", noon + 60 * minute, seen({ "2026-11-22": 1 }), [], "TRUE cost"],
    ["a cost seen by a failed look only", noon, seen({ "2026-11-22": 1 }, { asOfMs: null }), [], "TRUE cost"],
    [
      "the last millisecond of the next day",
      Date.parse("2026-11-23T23:59:59.999Z"),
      seen({ "2026-11-22": 1 }),
      [],
      "TRUE cost",
    ],
    [
      "the first of the day after",
      Date.parse("2026-11-24T00:00:00Z"),
      seen({ "2026-11-22": 1 }),
      ["--max-age", "24h"],
      "TRUE unknown",
    ],
    [
      "midnight drops the day before yesterday",
      Date.parse("2026-11-23T00:00:00Z"),
      seen({ "2026-11-21": 1, "2026-11-22": 0 }),
      ["--max-age", "24h"],
      "FALSE none",
    ],
    [
      "a leap day",
      Date.parse("2028-03-01T00:00:01Z"),
      { ...UNSEEN, asOfMs: Date.parse("2028-03-01T00:00:00Z"), sums: { "2028-02-29": 1 } },
      [],
      "TRUE cost",
    ],
    [
      "a look from after midnight, the clock set back before it",
      Date.parse("2026-11-21T23:59:59Z"),
      seen(none, { asOfMs: Date.parse("2026-11-22T00:00:02Z") }),
      [],
      "TRUE unknown",
    ],
    [
      "tokens below both limits",
      noon,
      seen({ ...none, "2026-11-22 *-mini": 99, "2026-11-22 *": 9 }),
      tokens,
      "FALSE none",
    ],
    ["tokens exactly at a limit", noon, seen({ ...none, "2026-11-22 *-mini": 100 }), tokens, "TRUE allowance"],
    ["tokens above the second limit", noon, seen({ ...none, "2026-11-22 *": 11 }), tokens, "TRUE allowance"],
    ["tokens of yesterday", noon, seen({ ...none, "2026-11-21 *-mini": 500 }), tokens, "FALSE none"],
    ["tokens of an allowance that is none", noon, seen({ ...none, "2026-11-22 *-min": 500 }), tokens, "FALSE none"],
    ["tokens are no cost", noon, seen({ ...none, "2026-11-22 *": 500 }), [], "FALSE none"],
    [
      "tokens seen by a failed look only",
      noon,
      seen({ "2026-11-22 *-mini": 100 }, { asOfMs: null }),
      tokens,
      "TRUE allowance",
    ],
    ["a cost goes before tokens", noon, seen({ "2026-11-22": 1, "2026-11-22 *-mini": 100 }), tokens, "TRUE cost"],
  ];
  test.each(decisions)("%s", (_, now, reading, argv, expected) => {
    const { open, reason } = decide({ now, reading, options: optionsOf(...argv) });
    expect(`${open ? "TRUE" : "FALSE"} ${reason}`).toBe(expected);
  });

  test("the message says how much, when and why", () => {
    const say = (reading: Reading, now = noon) => decide({ now, reading, options: optionsOf() }).message;
    expect(say(seen({ "2026-11-21": 0.1, "2026-11-22": 0.42 }))).toBe(
      "0.1 usd on 2026-11-21 and 0.42 usd on 2026-11-22 (UTC)",
    );
    expect(say(seen(none))).toBe("no cost on 2026-11-21 and 2026-11-22 (UTC)");
    expect(say({ ...UNSEEN, error: "Cannot read" })).toBe("no good look at the account yet: Cannot read");
    expect(say(seen(none, { error: "Cannot read" }), noon + 20 * minute)).toBe(
      "the last good look is 1200 s old: Cannot read",
    );
  });

  const failed = { error: "x" };
  const merges: [string, Reading, Reading, Partial<Reading>][] = [
    ["a good look replaces a cost", seen({ a: 5, c: 2 }), seen({ a: 1 }), { sums: { a: 1 }, error: null }],
    ["a failed look raises", seen({ a: 1 }), seen({ a: 2, b: 3 }, failed), { sums: { a: 2, b: 3 }, error: "x" }],
    ["a failed look lowers nothing", seen({ a: 5 }), seen({ a: 2 }, failed), { sums: { a: 5 } }],
    ["a failed look is not good", seen({}, { asOfMs: 7 }), seen({}, failed), { asOfMs: 7 }],
    ["one by a wrong clock ends it", seen({ a: 1 }), { ...UNSEEN, ...failed }, { asOfMs: null, sums: { a: 1 } }],
    ["nor the first one", UNSEEN, seen({ a: 1 }, failed), { asOfMs: null, sums: { a: 1 } }],
  ];
  test.each(merges)("%s", (_, reading, look, expected) => {
    expect(mergeLook(reading, look)).toEqual({ ...look, ...expected });
  });

  test("a model counts toward the first allowance that it matches, cached tokens once, null as the empty name", () => {
    const rows = usage(
      { model: "o3-mini", input: 10, output: 5, cached: 8 },
      { model: "o3", input: 1, output: 1 },
      { model: null, input: 2, output: 0 },
    );
    const { entries } = readPage(rows, UsageRowSchema);
    const options = optionsOf(...tokens);
    expect(addEntries({}, entries, { now: Date.now(), options })).toEqual({
      [`${today()} *-mini`]: 15,
      [`${today()} *`]: 4,
    });
    expect(addEntries({}, entries, { now: Date.now(), options: optionsOf(...tokens.slice(0, 4)) })).toEqual({
      [`${today()} *-mini`]: 15,
    });
  });

  test("a credit hides no cost, whatever stands beside it", () => {
    const { entries } = readPage(page([bucket(0, 0.25, -5, 0.25)]), CostRowSchema);
    expect(addEntries({ [today()]: 1 }, entries, { now: Date.now(), options: optionsOf() })).toEqual({
      [today()]: 1.5,
    });
  });
});

// ── The protocol ────────────────────────────────────────────────────────────────────────────────

suite("the protocol", () => {
  /** For what is answered without looking at anything. */
  const nothing: Info = describeInfo({ now: 0, reading: UNSEEN, options: optionsOf(), startedMs: 0, gateway: null });
  const lines: [string, boolean, string][] = [
    ["STATUS", false, "STATUS"],
    ["status", true, "STATUS"],
    ["  StAtUs \t\r", false, "STATUS"],
    ["HELP", false, "HELP"],
    ["INFO", true, "INFO"],
    ["INFO", false, "ERR Not Allowed"],
    ["", true, "ERR Unknown Command"],
    ["STATUS now", true, "ERR Unknown Command"],
    ["STATUSX", true, "ERR Unknown Command"],
    ["\u017ftatus", true, "ERR Unknown Command"],
    ["STATUS\0", true, "ERR Unknown Command"],
    ["GET / HTTP/1.1", true, "ERR Unknown Command"],
    ["__proto__", true, "ERR Unknown Command"],
    ["STOP", true, "ERR Unknown Command"],
  ];
  test.each(lines)("%j asked locally %p is %p", (line, local, expected) => {
    const question = findQuestion(line, { isLocal: () => local });
    const name = LINE_COMMANDS.find((command) => command === question)?.name;
    expect(name ?? question.reply(nothing)).toBe(expected);
  });

  test("every line of HELP begins with its command", () => {
    const help = findQuestion("HELP", { isLocal: () => false }).reply(nothing) ?? "";
    const names = [...LINE_COMMANDS.map(({ name }) => name), "{"];
    expect(help.split("\n").map((line) => line.split(" ")[0])).toEqual(names);
  });

  const cuts: [string, boolean, ReturnType<typeof takeLine> | string][] = [
    ["STATUS\nrest", false, "STATUS"],
    ["STATUS\r\n", false, "STATUS\r"],
    ["STATUS", false, "incomplete"],
    ["STATUS", true, "STATUS"],
    ["", false, "incomplete"],
    ["", true, ""],
    ["0123456789\n", false, "0123456789"],
    ["0123456789\r\n", false, "0123456789\r"],
    ["0123456789\r", false, "incomplete"],
    ["0123456789a", false, "too long"],
    ["0123456789a\n", false, "too long"],
  ];
  test.each(cuts)("of %j, ended %p, at most 10 bytes, the line is %j", (text, ended, expected) => {
    const cut = takeLine(Buffer.from(text), { ended, limit: 10 });
    expect(typeof cut === "string" ? cut : cut.line).toBe(String(expected));
  });
});

// ── The truth ───────────────────────────────────────────────────────────────────────────────────
// What the account answers, and what STATUS, INFO and check make of it, through real HTTP.

type Verdict = "FALSE none" | "TRUE cost" | "TRUE unknown";

const COSTS = "/v1/organization/costs";
const big = JSON.stringify(page([])).slice(0, -1);
const pages =
  (...answers: string[]): Respond =>
  ({ query }) =>
    answers[Number(query.get("page") ?? 0)] ?? http("", { status: 500 });
const always =
  (answer: string | null): Respond =>
  () =>
    answer;
const body = (data: unknown): Respond => always(http(page(data)));
/** Has a cost on its second page, which only its own cursor leads to. */
const pagesBy =
  (cursor: string): Respond =>
  ({ query }) => {
    if (query.get("page") === null) return http(page([], cursor));
    return http(page(query.get("page") === cursor ? [bucket(0, 1)] : []));
  };
/** Its strings of digits are numbers. */
const unquoted = (data: unknown): Respond => always(http(JSON.stringify(data).replace(/"([\d.]+E-\d+)"/g, "$1")));
const dated = (offsetMs: number) => ({ headers: { Date: new Date(Date.now() + offsetMs).toUTCString() } });
const cents = (total_usage: unknown, daily_costs?: unknown): Respond =>
  always(http({ object: "list", total_usage, daily_costs }));
const daily = (daysAgo: number, ...costs: unknown[]) => ({
  timestamp: Date.parse(formatDay(Date.now() - daysAgo * DAY)) / 1000,
  line_items: costs.map((cost) => ({ name: "x", cost })),
});

const truths: [string, Respond, Verdict, string?][] = [
  ["no bucket", body([]), "FALSE none"],
  ["buckets without rows", body([bucket(1), bucket(0)]), "FALSE none"],
  ["zero as a number", body([bucket(1, 0), bucket(0, 0)]), "FALSE none"],
  ["zero as 0E-6176", body([bucket(0, "0E-6176")]), "FALSE none"],
  ["only a credit", body([bucket(0, -5)]), "FALSE none"],
  ["no currency", body([bucket(0, { value: 0 })]), "FALSE none"],
  [
    "unknown members",
    always(http({ ...page([{ ...bucket(0, 0), start_time_iso: "x" }]), organization_id: "org" })),
    "FALSE none",
  ],
  [
    "an older answer with result",
    body([{ ...bucket(0), results: undefined, result: bucket(0, 0).results }]),
    "FALSE none",
  ],
  ["a cost of the day before yesterday", body([bucket(2, 7), bucket(1, 0), bucket(0, 0)]), "FALSE none"],
  ["error null", always(http({ ...page([bucket(0, 0)]), error: null })), "FALSE none"],
  [
    "three pages of nothing",
    pages(http(page([bucket(1)], "1")), http(page([bucket(0)], "2")), http(page([]))),
    "FALSE none",
  ],
  ["an Age of 60 s", always(http(page([]), { headers: { Age: "60" } })), "FALSE none"],
  ["a Date 9 minutes off", always(http(page([]), dated(9 * 60_000))), "FALSE none"],
  ["a cost today", body([bucket(0, 0.01)]), "TRUE cost"],
  ["a cost yesterday", body([bucket(1, 0.01), bucket(0, 0)]), "TRUE cost"],
  ["a very small cost as a string", body([bucket(0, "0.003627500000000000000000000000000000")]), "TRUE cost"],
  ["a cost too small for a number", body([bucket(0, "1E-6176")]), "TRUE cost"],
  ["a number that is too small for one", unquoted(page([bucket(0, "1E-6176")])), "TRUE cost"],
  ["a cost beside a number that is too small for one", unquoted(page([bucket(0, "1E-6176", 5)])), "TRUE cost"],
  ["a number with 230 zeros", unquoted(page([bucket(0, `0.${"0".repeat(230)}1E-99`)])), "TRUE cost"],
  ["a zero with 230 zeros", unquoted(page([bucket(0, `0.${"0".repeat(230)}E-99`)])), "FALSE none"],
  ["a cursor that looks like a number that is too small", pagesBy("org:1234567e-1234, 1e-400"), "TRUE cost"],
  [
    "a number that is too small for a currency",
    unquoted(page([bucket(0, { value: 0, currency: "1E-400" })])),
    "TRUE unknown",
  ],
  ["a zero with an exponent", unquoted(page([bucket(0, "0E-6176")])), "FALSE none"],
  ["a cost beside a larger credit", body([bucket(0, -5, 0.01)]), "TRUE cost"],
  ["a cost in another currency", body([bucket(0, { value: 1, currency: "EUR" })]), "TRUE unknown"],
  ["a cost in USD", body([bucket(0, { value: 1, currency: "USD" })]), "TRUE cost"],
  ["a cost beside one in another currency", body([bucket(0, { value: 1, currency: "eur" }, 1)]), "TRUE cost"],
  [
    "a cost in an older answer",
    body([{ ...bucket(0), results: undefined, result: bucket(0, 1).results }]),
    "TRUE cost",
  ],
  ["a cost of tomorrow", body([bucket(-1, 1)]), "TRUE cost"],
  ["a cost on page 2 of 3", pages(http(page([], "1")), http(page([bucket(0, 1)], "2")), http(page([]))), "TRUE cost"],
  ["a cost on page 1, page 2 fails", pages(http(page([bucket(0, 1)], "1")), http("", { status: 500 })), "TRUE cost"],
  [
    "a cost on page 1, page 2 hangs",
    ({ query }) => (query.has("page") ? null : http(page([bucket(0, 1)], "1"))),
    "TRUE cost",
  ],
  ["a cost beside a row without an amount", body([bucket(0, { currency: "usd" }, 1)]), "TRUE cost"],
  ["a cost, then has_more without a cursor", always(http({ ...page([bucket(0, 1)]), has_more: true })), "TRUE cost"],
  [
    "a row without an amount",
    body([{ ...bucket(0), results: [{ object: "organization.costs.result" }] }]),
    "TRUE unknown",
  ],
  ["an amount without a value", body([bucket(0, { currency: "usd" })]), "TRUE unknown"],
  ["a value that is null", body([bucket(0, { value: null, currency: "usd" })]), "TRUE unknown"],
  ["a value that is empty", body([bucket(0, { value: "", currency: "usd" })]), "TRUE unknown"],
  ["a value that is no number", body([bucket(0, { value: "free", currency: "usd" })]), "TRUE unknown"],
  ["a value beyond all numbers", body([bucket(0, "1e999")]), "TRUE unknown"],
  ["two currencies", body([bucket(0, { value: 0, currency: "eur" }, 0)]), "TRUE unknown"],
  ["an empty currency", body([bucket(0, { value: 0, currency: "" })]), "TRUE unknown"],
  ["a bucket without results", body([{ start_time: 1.7e9 }]), "TRUE unknown"],
  ["a bucket without a start", body([{ results: [] }]), "TRUE unknown"],
  ["a start in milliseconds", body([{ start_time: Date.now(), results: [] }]), "TRUE unknown"],
  ["a bucket of a month", body([{ ...bucket(20, 1), end_time: bucket(0).end_time }]), "TRUE unknown"],
  [
    "a bucket without an end that reaches into yesterday",
    body([{ ...bucket(2, 5), start_time: bucket(2).start_time + 3600, end_time: undefined }]),
    "TRUE unknown",
  ],
  [
    "a bucket without an end that begins within today",
    body([{ ...bucket(0, 0), start_time: bucket(0).start_time + 3600, end_time: undefined }]),
    "TRUE unknown",
  ],
  [
    "a cost of a bucket that begins a microsecond before yesterday",
    body([{ ...bucket(1, 5), start_time: bucket(1).start_time - 1e-6, end_time: undefined }]),
    "TRUE unknown",
  ],
  ["a bucket without an end", body([{ ...bucket(0, 0), end_time: undefined }]), "FALSE none"],
  ["a bucket of a day and a second", body([{ ...bucket(1, 0), end_time: bucket(0).start_time + 1 }]), "TRUE unknown"],
  ["a bucket that ends as it begins", body([{ ...bucket(1, 5), end_time: bucket(1).start_time }]), "TRUE cost"],
  ["a bucket that ends before it begins", body([{ ...bucket(0, 5), end_time: bucket(3).start_time }]), "TRUE cost"],
  ["a cost far in the future", body([bucket(-3, 1)]), "TRUE cost"],
  ["data that is no list", body({}), "TRUE unknown"],
  ["no data", always(http({ object: "page", has_more: false })), "TRUE unknown"],
  ["no has_more", always(http({ object: "page", data: [] })), "TRUE unknown"],
  ["another object", always(http({ ...page([]), object: "list" })), "TRUE unknown"],
  ["has_more without a cursor", always(http({ ...page([]), has_more: true })), "TRUE unknown"],
  ["a cursor beside has_more false", always(http({ ...page([], "1"), has_more: false })), "TRUE unknown"],
  [
    "a cost beside a cursor and has_more false",
    always(http({ ...page([bucket(0, 1)], "1"), has_more: false })),
    "TRUE cost",
  ],
  ["an empty cursor", always(http({ ...page([]), has_more: true, next_page: "" })), "TRUE unknown"],
  ["a cursor that repeats itself", always(http(page([], "again"))), "TRUE unknown"],
  ["pages without end", ({ query }) => http(page([], String(Number(query.get("page") ?? 0) + 1))), "TRUE unknown"],
  ["a number", always(http("0")), "TRUE unknown"],
  ["null", always(http("null")), "TRUE unknown"],
  ["a list", always(http("[]")), "TRUE unknown"],
  ["an empty object", always(http("{}")), "TRUE unknown"],
  ["an empty body", always(http("")), "TRUE unknown"],
  ["HTML", always(http("<html>sign in</html>")), "TRUE unknown"],
  ["a body cut short", always(http(JSON.stringify(page([])).slice(0, -4))), "TRUE unknown"],
  ["bytes that are no UTF-8", always(http(page([])).replace("page", "p\ufffdge")), "TRUE unknown"],
  [
    "an error with status 200",
    always(http({ ...page([]), error: { message: "x", type: "one_api_error" } })),
    "TRUE unknown",
  ],
  ["a bare error with status 200", always(http({ ...page([]), error: "x" })), "TRUE unknown"],
  ["an error of unknown shape", always(http({ ...page([]), error: {} })), "TRUE unknown"],
  ["status 201", always(http(page([]), { status: 201 })), "TRUE unknown"],
  ["status 204", always(http("", { status: 204 })), "TRUE unknown"],
  ["status 400", always(http(page([]), { status: 400 })), "TRUE unknown"],
  ["status 401 with a body over 1 MiB", always(http(" ".repeat(2 ** 21), { status: 401 })), "TRUE unknown"],
  ["status 401", always(http({ error: { message: "Incorrect API key" } }, { status: 401 })), "TRUE unknown"],
  ["status 403", always(http({ error: "Missing scopes: api.usage.read." }, { status: 403 })), "TRUE unknown"],
  ["status 404", always(http("", { status: 404 })), "TRUE unknown"],
  ["status 429", always(http({ error: { message: "slow" } }, { status: 429 })), "TRUE unknown"],
  ["status 500 with a good body", always(http(page([]), { status: 500 })), "TRUE unknown"],
  ["a redirect", always(http("", { status: 302, headers: { Location: "http://127.0.0.1:1/" } })), "TRUE unknown"],
  ["a Date 11 minutes ahead", always(http(page([]), dated(11 * 60_000))), "TRUE unknown"],
  ["an Age of 61 s", always(http(page([]), { headers: { Age: "61" } })), "TRUE unknown"],
  ["an Age that is no number", always(http(page([]), { headers: { Age: "0, 86400" } })), "TRUE unknown"],
  ["a Date 11 minutes behind", always(http(page([]), dated(-11 * 60_000))), "TRUE unknown"],
  ["a Date that is none", always(http(page([]), { headers: { Date: "yesterday" } })), "TRUE unknown"],
  ["a body of 2 MiB", always(http(`${big}${" ".repeat(2 ** 21)}}`)), "TRUE unknown"],
  ["a hang", always(null), "TRUE unknown"],
  [
    "a hang after the head",
    (_, socket) => (socket.write("HTTP/1.1 200 X\r\nContent-Length: 99\r\n\r\n{"), null),
    "TRUE unknown",
  ],
  ["a reset", (_, socket) => (socket.terminate(), null), "TRUE unknown"],
  ["no HTTP", always("hello\r\n\r\n"), "TRUE unknown"],
  ["billing: nothing", cents(0), "FALSE none", "billing"],
  ["billing: days of nothing", cents(0, [daily(1, 0), daily(0, 0)]), "FALSE none", "billing"],
  ["billing: old days only", cents(7, [daily(5, 7)]), "FALSE none", "billing"],
  [
    "billing: a day that begins elsewhere",
    cents(50, [{ timestamp: daily(1).timestamp - 8 * 3600, line_items: [{ cost: 50 }] }]),
    "TRUE cost",
    "billing",
  ],
  [
    "billing: a free day that begins elsewhere",
    cents(0, [{ timestamp: daily(1).timestamp - 8 * 3600, line_items: [{ cost: 0 }] }]),
    "TRUE unknown",
    "billing",
  ],
  ["billing: a cost too small for a number", cents("1E-6176"), "TRUE cost", "billing"],
  ["billing: a number that is too small for one", unquoted({ total_usage: "0.1E-400" }), "TRUE cost", "billing"],
  ["billing: a total beside a credit", cents(50, [daily(5, 100, -100)]), "TRUE cost", "billing"],
  ["billing: 0.4 cents", cents(0.4), "TRUE cost", "billing"],
  ["billing: a lifetime total", cents(1840.98), "TRUE cost", "billing"],
  ["billing: a cost yesterday", cents(0.4, [daily(1, 0.4), daily(0, 0)]), "TRUE cost", "billing"],
  ["billing: more than the days", cents(5, [daily(5, 4)]), "TRUE cost", "billing"],
  ["billing: a cost beside a bad item", cents(5, [daily(0, null, 5)]), "TRUE cost", "billing"],
  ["billing: a cost and no total", cents(undefined, [daily(0, 5)]), "TRUE cost", "billing"],
  ["billing: no total", cents(undefined), "TRUE unknown", "billing"],
  ["billing: a total below 0", cents(-5), "TRUE unknown", "billing"],
  ["billing: a total below 0 beside days of nothing", cents("-1e-9", [daily(0, 0)]), "TRUE unknown", "billing"],
  ["billing: a total below 0 beside a cost", cents(-5, [daily(0, 5)]), "TRUE cost", "billing"],
  ["billing: a total that is null", cents(null), "TRUE unknown", "billing"],
  ["billing: an item without a cost", cents(0, [daily(0, undefined)]), "TRUE unknown", "billing"],
  [
    "billing: an error with status 200",
    always(http({ error: { message: "x", type: "one_api_error" } })),
    "TRUE unknown",
    "billing",
  ],
  [
    "billing: the refusal of api.openai.com",
    always(http({ error: { message: "must be made with a session key", type: "server_error" } }, { status: 403 })),
    "TRUE unknown",
    "billing",
  ],
];

suite("the truth", () => {
  test.each(truths)("%s", async (name, respond, verdict, source = "costs") => {
    using account = startAccount(respond);
    const argv = ["--base-url", account.base, "--source", source, "--timeout", name.includes("hang") ? "500ms" : "5s"];
    await using breaker = await serve(argv);
    const { open, reason, error } = await breaker.info();
    expect(`${await breaker.ask("STATUS")} ${reason}`).toBe(verdict);
    expect(open).toBe(verdict !== "FALSE none");
    if (verdict === "FALSE none") expect(error).toBeNull();
    if (verdict === "TRUE unknown") await until(async () => (await breaker.info()).error);
    const { code, out } = await run(["check", "--json", ...argv]);
    expect(code).toBe({ "FALSE none": 0, "TRUE cost": 1, "TRUE unknown": 69 }[verdict]);
    expect(JSON.parse(out)).toMatchObject({ open, reason });
  });

  test("there are at least 50 of them", () => expect(truths.length).toBeGreaterThan(50));

  test("a body that drips is late", async () => {
    using account = startAccount((_, socket) => {
      socket.write("HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n");
      const timer = setInterval(() => {
        if (socket.write("1\r\n \r\n") <= 0) clearInterval(timer);
      }, 20);
      setTimeout(() => clearInterval(timer), 2000);
      return null;
    });
    const { code, out } = await run(["check", "--base-url", account.base, "--source", "costs", "--timeout", "150ms"]);
    expect(code).toBe(69);
    expect(out).toContain("timed out");
  });

  test("a compressed answer is refused, whatever is in it", async () => {
    const plain = Buffer.from(`${big}${" ".repeat(2 ** 24)}}`);
    const bombs = { gzip: Bun.gzipSync(plain), zstd: Bun.zstdCompressSync(plain), br: Buffer.from("") };
    for (const [encoding, bomb] of Object.entries(bombs)) {
      using account = startAccount((_, socket) => {
        socket.write(`HTTP/1.1 200 X\r\nContent-Encoding: ${encoding}\r\nContent-Length: ${bomb.length}\r\n\r\n`);
        socket.write(bomb);
        return null;
      });
      const { code, out } = await run(["check", "--base-url", account.base, "--source", "costs"]);
      expect([code, out]).toEqual([69, expect.stringContaining("the answer is compressed")]);
      expect(account.requests[0]?.headers.get("accept-encoding")).toBe("identity");
    }
  });

  test.skipIf(!isLinux)("48 KiB of zstd do not become gigabytes of memory (Linux)", async () => {
    const bomb = Buffer.concat(Array<Buffer>(24).fill(Bun.zstdCompressSync(Buffer.alloc(2 ** 26, " "))));
    expect(bomb.length).toBeLessThan(2 ** 16);
    using account = startAccount((_, socket) => {
      socket.write(`HTTP/1.1 200 X\r\nContent-Encoding: zstd\r\nContent-Length: ${bomb.length}\r\n\r\n`);
      socket.write(bomb);
      return null;
    });
    await using breaker = await spawnBreaker(["--base-url", account.base], withKey);
    const { error } = await breaker.info();
    expect(error).toContain("the answer is compressed");
    expect(measureKib(breaker.pid, "most")).toBeLessThan(128 * 1024);
  });

  const slow: [string, string, string][] = [
    ["60,000 digits and a letter for an amount", "costs", http(page([bucket(0, `${"1".repeat(60_000)}x`)]))],
    ["60,000 digits and a letter for a total", "billing", http({ total_usage: `${"1".repeat(60_000)}x` })],
    ["1 MiB of bad rows", "costs", http(page([{ ...bucket(0), results: Array(340_000).fill({}) }]))],
    ["1 MiB of bad buckets", "costs", http(page(Array(340_000).fill({})))],
    ["1 MiB of buckets of a bad row each", "costs", http(page(Array(8000).fill({ ...bucket(0), results: [{}] })))],
    ["1 MiB of bad items", "billing", http({ total_usage: 0, daily_costs: Array(340_000).fill({}) })],
  ];
  test.each(slow)("%s freezes nothing", async (_, source, answer) => {
    using account = startAccount(always(answer));
    const argv = ["check", "--base-url", account.base, "--source", source, "--json"];
    // Processor time, since others may have the processors too.
    const before = process.cpuUsage();
    const { code, out } = await run(argv);
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000).toBeLessThan(600);
    expect(code).toBe(69);
    expect(JSON.parse(out).error).not.toContain("1 MiB"); // It was read.
  });

  test("tokens of a bucket that begins within yesterday make the look fail", async () => {
    const results = [{ input_tokens: 9e9, output_tokens: 9e9, model: "o3" }];
    const tokens = http(page([{ start_time: Date.parse(yesterday()) / 1000 + 16 * 3600, results }]));
    using account = startAccount(({ path }) => (path === COSTS ? FREE : tokens));
    const argv = ["check", "--base-url", account.base, "--source", "costs", "--allowance", "*=1M"];
    const { code, out } = await run(argv);
    expect([code, out]).toEqual([69, expect.stringContaining("Cannot read the token usage")]);
  });

  test("pages without end are followed 20 times", async () => {
    using account = startAccount(({ query }) => http(page([], String(Number(query.get("page") ?? 0) + 1))));
    const { code, out } = await run(["check", "--base-url", account.base, "--source", "costs"]);
    expect([code, out]).toEqual([69, expect.stringContaining("more than 20 pages")]);
    expect(account.requests).toHaveLength(20);
  });

  needs("openssl")("TLS is verified, whatever the environment says (openssl)", async () => {
    const folder = makeFolder();
    const [key, cert] = [join(folder, "key"), join(folder, "cert")];
    const subject = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1";
    const made = await sh(`openssl req -x509 -newkey rsa:2048 -nodes -days 1 ${subject} -keyout ${key} -out ${cert}`);
    expect(made).toMatchObject({ code: 0 });
    const keys: (string | null)[] = [];
    using server = Bun.serve({
      hostname: "127.0.0.1",
      port: 0,
      tls: { key: Bun.file(key), cert: Bun.file(cert) },
      fetch({ headers }) {
        keys.push(headers.get("authorization"));
        return Response.json(page([bucket(0, 0)]));
      },
    });
    const check = (env: Record<string, string>) => {
      const argv = ["check", "--base-url", `https://127.0.0.1:${server.port}/v1`, "--source", "costs"];
      return spawnCommand(argv, { env: { ...withKey.env, ...env } });
    };
    const { code, out } = await check({ NODE_TLS_REJECT_UNAUTHORIZED: "0" });
    expect([code, out, keys]).toEqual([69, expect.stringMatching(/certificate|self.signed/i), []]);
    // A root that the machine's owner has added is trusted, as a company's proxy needs.
    expect(await check({ NODE_EXTRA_CA_CERTS: cert })).toMatchObject({ code: 0 });
    expect(keys).toEqual([`Bearer ${KEY}`]);
  });

  test("the key does not follow a redirect", async () => {
    using target = startAccount(always(FREE));
    using account = startAccount(always(http("", { status: 307, headers: { Location: target.base } })));
    const { code, out } = await run(["check", "--base-url", account.base, "--source", "costs"]);
    expect([code, target.requests.length]).toEqual([69, 0]);
    expect(out).toContain("set --base-url");
  });

  test("the Costs API is asked for yesterday and today, with the key, the projects and every page", async () => {
    using account = startAccount(pages(http(page([], "1")), FREE));
    const argv = ["--base-url", account.base, "--source", "costs", "--project", "p1", "--project", "p2"];
    expect((await run(["check", ...argv])).code).toBe(0);
    expect(account.requests.map(({ path }) => path)).toEqual([COSTS, COSTS]);
    const [first, second] = account.requests;
    expect(first?.headers.get("authorization")).toBe(`Bearer ${KEY}`);
    expect(first?.query.get("start_time")).toBe(String(Date.parse(yesterday()) / 1000));
    expect(first?.query.get("bucket_width")).toBe("1d");
    expect(first?.query.getAll("project_ids[]")).toEqual(["p1", "p2"]);
    expect(second?.query.get("page")).toBe("1");
    expect(second?.query.getAll("project_ids[]")).toEqual(["p1", "p2"]);
  });

  test("the billing endpoint is asked for yesterday to tomorrow", async () => {
    using account = startAccount(cents(0));
    expect((await run(["check", "--base-url", account.base])).code).toBe(0);
    const [request] = account.requests;
    expect(request?.path).toBe("/v1/dashboard/billing/usage");
    expect(request?.query.get("start_date")).toBe(yesterday());
    expect(request?.query.get("end_date")).toBe(formatDay(Date.now() + DAY));
  });

  test("auto asks openai.com and its subdomains for costs, others for billing", () => {
    const sources = [
      "https://api.openai.com/v1",
      "https://eu.api.openai.com/v1",
      "https://openai.com",
      "https://notopenai.com",
      "https://openai.com.example",
    ];
    const moment = { now: 0, reading: UNSEEN, startedMs: 0, gateway: null };
    expect(sources.map((url) => describeInfo({ ...moment, options: optionsOf("--base-url", url) }).source)).toEqual([
      "costs",
      "costs",
      "costs",
      "billing",
      "billing",
    ]);
  });

  test("errors say what to do", async () => {
    const refusals: [Respond, RegExp][] = [
      [
        always(http({ error: "Missing scopes: api.usage.read." }, { status: 403 })),
        /HTTP 403; create an admin key with the scope api.usage.read at https.*pass insert MY_KEY/,
      ],
      [
        always(http({ error: { message: `Incorrect API key provided: ${KEY}.` } }, { status: 401 })),
        /HTTP 401; create an admin key/,
      ],
      [always(http("", { status: 404 })), /HTTP 404.*--base-url/],
      [always(http("<html>")), /not JSON; check --base-url/],
      [always(http(" ".repeat(2 ** 21))), /over 1 MiB; check the network and --base-url/],
      [always(http({ data: [] })), /has_more: .*; check --base-url and --source/],
    ];
    for (const [respond, expected] of refusals) {
      using account = startAccount(respond);
      const { out } = await run(["check", "--base-url", account.base, "--source", "costs", "--pass-entry", "MY_KEY"]);
      expect(out).toMatch(expected);
      expect(out).not.toMatch(/Incorrect|Missing|T3st/);
    }
  });

  test("an answer that breaks off, or is no HTTP, fails the look in words that are for a user", async () => {
    for (const sent of ["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "SSH-2.0-x\r\n\r\n"]) {
      const answer = { data: (socket: Bun.Socket) => void socket.end(sent) };
      const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: answer });
      const { code, out } = await run(["check", "--base-url", `http://127.0.0.1:${listener.port}`]);
      listener.stop(true);
      expect(code).toBe(69);
      expect(out).toContain("Cannot read the billing usage: ");
      expect(out).toContain("; check the network and --base-url");
      expect(out).not.toContain("verbose");
    }
  });

  test("what a proxy says is cut short, and holds no key", async () => {
    const sent = `HTTP/1.1 502 ${KEY} ${"x".repeat(5000)}\r\nContent-Length: 0\r\n\r\n`;
    const answer = { data: (socket: Bun.Socket) => void socket.end(sent) };
    const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: answer });
    const env = { OPENAI_ADMIN_KEY: KEY, HTTPS_PROXY: `http://127.0.0.1:${listener.port}` };
    const argv = ["check", "--base-url", "https://api.example.invalid/v1", "--source", "costs"];
    const { code, out } = await spawnCommand(argv, { env });
    listener.stop(true);
    expect([code, out]).toEqual([69, expect.stringContaining("Cannot read the costs: ")]);
    expect(out).not.toContain(KEY);
    expect(out).not.toContain("xxx");
    expect(out.length).toBeLessThan(1000);
  });

  test("a cursor that quotes the key, before a page that is no HTTP, is in no error", async () => {
    const key = "relay-0123456789";
    const first = page([bucket(0, 0)], key);
    using account = startAccount(({ query }) => (query.get("page") ? "HTTP/1.1 2000 X\r\n\r\n" : http(first)));
    const argv = ["check", "--base-url", account.base, "--source", "costs"];
    const { code, out } = await run(argv, { env: { OPENAI_ADMIN_KEY: key } });
    expect([code, out]).toEqual([69, expect.stringContaining("Cannot read the costs: Malformed_HTTP_Response")]);
    expect(out).not.toContain(key);
  });

  test("check prints the days, the costs and the verdict", async () => {
    const tokens = http(usage({ model: "o3", input: 100, output: 20 }));
    using account = startAccount(({ path }) => (path === COSTS ? CENT : tokens));
    const argv = ["check", "--base-url", account.base, "--source", "costs", "--allowance", "*=1M"];
    const { out } = await run(argv);
    expect(out).toStartWith(
      `${yesterday()}  0 usd\n${today()}  0.01 usd\n*           [....................] 120 of 1000000 tokens\nopen: 0.01 usd on ${today()} (UTC)\n`,
    );
    const info: Info = JSON.parse((await run([...argv, "--json"])).out);
    expect(info).toMatchObject({
      open: true,
      reason: "cost",
      threshold: 0,
      allowances: [{ models: "*", used: 120, limit: 1e6 }],
      source: "costs",
      version: VERSION,
    });
    expect(formatCheck(info, { now: Date.now(), isColoured: true })).toContain("\x1b[1;31mopen\x1b[0m");
  });
});

suite("by the name localhost", () => {
  const loopbacks = Object.values(networkInterfaces()).flat();
  const isThere = loopbacks.some((one) => one?.address === "::1");

  test.skipIf(!isThere)("a listener on ::1 gets no key, and its answer does not count (IPv6)", async () => {
    const heard: string[] = [];
    using squatter = Bun.listen({
      hostname: "::1",
      port: 0,
      socket: {
        data(socket, chunk) {
          heard.push(String(chunk));
          socket.end(heard.length > 1 ? "FALSE\n" : FREE);
        },
      },
    });
    const base = `http://localhost:${squatter.port}/v1`;
    const { code, out } = await run(["check", "--base-url", base, "--source", "costs"]);
    expect([code, out]).toEqual([69, expect.stringContaining("check the network")]);
    const at = ["--host", "localhost", "--port", String(squatter.port)];
    expect(await run(["status", ...at])).toMatchObject({ code: 69, out: "" });
    expect(await run(["exec", ...at, "--", "true"])).toMatchObject({ code: 69 });
    expect(heard).toEqual([]);
  });
});

// ── The watch ───────────────────────────────────────────────────────────────────────────────────

suite("the watch", () => {
  const quick = ["--source", "costs", "--interval", "20ms", "--timeout", "300ms"];

  test("a cost that appears trips, and one that a good look does not confirm resets", async () => {
    let answer = FREE;
    using account = startAccount(() => answer);
    await using breaker = await serve(["--base-url", account.base, ...quick]);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    answer = CENT;
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    answer = http("", { status: 500 });
    await until(async () => (await breaker.info()).error);
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    answer = FREE;
    await until(async () => (await breaker.ask("STATUS")) === "FALSE");
    expect((await breaker.info()).error).toBeNull();
  });

  test("a good look that is older than --max-age counts no more", async () => {
    let answer: string | null = FREE;
    using account = startAccount(() => answer);
    await using breaker = await serve(["--base-url", account.base, ...quick, "--max-age", "400ms"]);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    answer = null;
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    expect(await breaker.info()).toMatchObject({ reason: "unknown", asOf: expect.any(String), ageSeconds: 0 });
  });

  test("one look at a time, however many ask, and none because they ask", async () => {
    let [running, most] = [0, 0];
    using account = startAccount((_, socket) => {
      most = Math.max(most, ++running);
      setTimeout(() => {
        running--;
        socket.write(FREE);
        socket.end();
      }, 50);
      return null;
    });
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const answers = await Promise.all(Array.from({ length: 200 }, () => breaker.ask("STATUS")));
    expect(new Set(answers)).toEqual(new Set(["FALSE"]));
    expect([account.requests.length, most]).toEqual([1, 1]);
  });

  test("STATUS waits for the first look, and at most --timeout", async () => {
    using account = startAccount(always(null));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs", "--timeout", "200ms"]);
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    await until(async () => (await breaker.info()).error);
    expect(await breaker.info()).toMatchObject({
      open: true,
      reason: "unknown",
      cost: null,
      asOf: null,
      ageSeconds: null,
      error: expect.stringContaining("timed out"),
    });
  });

  test("HELP and unknown commands wait for nothing", async () => {
    using account = startAccount(always(null));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs", "--timeout", "60s"]);
    expect(await breaker.ask("nonsense")).toBe("ERR Unknown Command");
    expect(await breaker.ask("HELP")).toStartWith("STATUS");
  });

  test("SIGHUP looks now and reads the key afresh", async () => {
    let key = KEY;
    using account = startAccount(always(FREE));
    const env = {
      get OPENAI_ADMIN_KEY() {
        return key;
      },
    };
    const argv = ["--host", "127.0.0.1", "--port", "0", "--base-url", account.base, "--source", "costs"];
    const done = main(argv, surround({ env }));
    await until(() => account.requests.length === 1);
    key = "sk-admin-another";
    process.emit("SIGHUP", "SIGHUP");
    await until(() => account.requests.length === 2);
    expect(account.requests[1]?.headers.get("authorization")).toBe("Bearer sk-admin-another");
    process.emit("SIGTERM", "SIGTERM");
    expect(await done).toBe(0);
  });

  test("what was seen with another key says nothing of the account of a new one", async () => {
    const file = join(makeFolder(), "key");
    writeFileSync(file, KEY);
    using account = startAccount(({ headers }) =>
      headers.get("authorization") === `Bearer ${KEY}` ? FREE : http("", { status: 500 }),
    );
    const env = { OPENAI_ADMIN_KEY: "", ...makePass(`cat ${file}`) };
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"], { env });
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    writeFileSync(file, "sk-admin-another");
    process.emit("SIGHUP", "SIGHUP");
    await until(async () => (await breaker.info()).error);
    expect(await breaker.info()).toMatchObject({ open: true, reason: "unknown", asOf: null });
  });

  test("a pass that fails tells nobody the key that it gave before", async () => {
    const file = join(makeFolder(), "key");
    writeFileSync(file, "relay-key-of-yesterday");
    using account = startAccount(() => FREE);
    const pass = makePass(`cat ${file} && exit; echo "cannot show relay-key-of-yesterday" >&2; exit 1`);
    const argv = ["--base-url", account.base, "--source", "costs"];
    await using breaker = await serve(argv, { env: { OPENAI_ADMIN_KEY: "", ...pass } });
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    rmSync(file);
    process.emit("SIGHUP", "SIGHUP");
    expect(await until(async () => (await breaker.info()).error)).toMatch(/cannot show sk-\*\*\*; install pass/);
  });

  test.each([200, 401, 500])(
    "a Date with HTTP %i that proves the clock wrong voids the last good look",
    async (status) => {
      let answer = FREE;
      using account = startAccount(() => answer);
      await using breaker = await serve(["--base-url", account.base, ...quick]);
      expect(await breaker.ask("STATUS")).toBe("FALSE");
      answer = http(page([]), { status, headers: { Date: new Date(Date.now() + 3 * 3600_000).toUTCString() } });
      await until(async () => (await breaker.info()).error);
      expect(await breaker.info()).toMatchObject({ open: true, reason: "unknown", asOf: null });
    },
  );

  test("Retry-After is honoured", async () => {
    using account = startAccount(always(http("", { status: 429, headers: { "Retry-After": "30" } })));
    await using breaker = await serve(["--base-url", account.base, ...quick]);
    await until(async () => (await breaker.info()).error);
    await Bun.sleep(200); // ten intervals
    expect(account.requests.length).toBe(1);
  });

  test("after a sleep STATUS waits for a look that began after it", async () => {
    let [offsetMs, answer] = [0, FREE];
    using account = startAccount(() => answer);
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"], {
      now: () => Date.now() + offsetMs,
    });
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    offsetMs = 5 * 60_000;
    answer = CENT;
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    expect(account.requests.length).toBe(2);
  });

  test("a clock that is set back voids the last good look, until there is another", async () => {
    let [offsetMs, answer]: [number, string | null] = [0, FREE];
    using account = startAccount(() => answer);
    const argv = ["--base-url", account.base, "--source", "costs", "--timeout", "300ms"];
    await using breaker = await serve(argv, { now: () => Date.now() + offsetMs });
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    [offsetMs, answer] = [-11_000, null];
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    expect(await breaker.info()).toMatchObject({ reason: "unknown", asOf: null });
    [offsetMs, answer] = [-22_000, FREE];
    await until(async () => (await breaker.ask("STATUS")) === "FALSE");
  });

  test("a look that began while the clock was wrong counts for nothing", async () => {
    let [offsetMs, looks] = [0, 0];
    const now = () => Date.now() + offsetMs;
    const look = async () => {
      const asOfMs = now();
      offsetMs = 0;
      return { ...UNSEEN, asOfMs, error: looks++ === 0 ? null : "it failed" };
    };
    const { watch, stop } = prepareWorld(["--source", "costs"], { now, look });
    offsetMs = 5 * 60_000; // Nobody has noticed it yet when the look begins.
    await until(() => looks > 0);
    await watch.whenSettled();
    expect(watch.describe()).toMatchObject({ open: true, reason: "unknown", asOf: null });
    stop.abort();
  });

  test("that the clock counts whole milliseconds is no jump, however short --max-age is", async () => {
    const { watch, stop } = prepareWorld(["--source", "costs", "--max-age", "1ms"]);
    await watch.whenSettled();
    let waits = 0;
    for (const endMs = performance.now() + 50; performance.now() < endMs;) if (watch.whenSettled()) waits++;
    stop.abort();
    expect(waits).toBe(0);
  });

  test("who asks while others wait for a look waits only for the rest of it", async () => {
    using account = startAccount(always(null));
    const argv = ["--base-url", account.base, "--source", "costs", "--timeout", "600ms"];
    await using breaker = await serve(argv, { env: { OPENAI_ADMIN_KEY: "", ...makePass("sleep 60") } });
    const first = breaker.ask("STATUS");
    await Bun.sleep(300); // half of the wait
    const second = breaker.ask("STATUS");
    expect(await first).toBe("TRUE");
    expect(await within(200, () => second)).toBe("TRUE");
    expect(await within(200, () => breaker.ask("STATUS"))).toBe("TRUE"); // The look is still under way.
  });

  test("FALSE when unknown is said only where the user wants it", async () => {
    using account = startAccount(always(http("", { status: 500 })));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs", "--when-unknown", "false"]);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    expect(await breaker.info()).toMatchObject({ open: false, reason: "unknown" });
  });

  test("an allowance that is used up trips, and a usage request that fails makes the look fail", async () => {
    let [costs, tokens] = [FREE, http(usage({ model: "o3", input: 5, output: 4, cached: 5 }))];
    using account = startAccount(({ path }) => (path === COSTS ? costs : tokens));
    await using breaker = await serve(["--base-url", account.base, ...quick, "--allowance", "o?=10"]);
    expect(await breaker.info()).toMatchObject({ open: false, allowances: [{ models: "o?", used: 9, limit: 10 }] });
    tokens = http(usage({ model: "o3", input: 5, output: 5 }));
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    expect(await breaker.info()).toMatchObject({
      reason: "allowance",
      allowances: [{ models: "o?", used: 10, limit: 10 }],
    });
    const { query } = account.requests.findLast(({ path }) => path !== COSTS) ?? {};
    expect([query?.get("group_by[]"), query?.get("start_time")]).toEqual(["model", String(Date.parse(today()) / 1000)]);
    [costs, tokens] = [CENT, http("", { status: 500 })];
    await until(async () => (await breaker.info()).error);
    expect(await breaker.info()).toMatchObject({
      reason: "cost",
      error: expect.stringContaining("Cannot read the token usage: HTTP 500"),
    });
  });
});

// ── The server ──────────────────────────────────────────────────────────────────────────────────

/** An address of this machine that is not loopback, where it has one. */
const second = Object.values(networkInterfaces())
  .flat()
  .find((one) => one?.family === "IPv4" && !one.internal)?.address;
const TEST_ADDRESS = "198.51.100.7";
/** Runs a program in a network of its own that has one, where that is allowed. */
const ALONE = findLoneNetwork();

function findLoneNetwork(): string[] | null {
  const script = `ip link set lo up && ip addr add ${TEST_ADDRESS}/32 dev lo && exec "$0" "$@"`;
  const argv = ["unshare", "-r", "-n", "sh", "-c", script];
  const isHere = ["unshare", "nsenter", "ip"].every((program) => Bun.which(program) !== null);
  return isHere && Bun.spawnSync([...argv, "true"]).success ? argv : null;
}

suite("the server", () => {
  let account = startAccount(always(FREE));
  const free = () => ["--base-url", account.base, "--source", "costs"];
  afterAll(() => account[Symbol.dispose]());

  const questions: [string, (string | Uint8Array)[], string][] = [
    ["a line", ["STATUS\n"], "FALSE\n"],
    ["a line of Windows", ["status\r\n"], "FALSE\n"],
    ["the end of input for the end of the line", ["STATUS"], "FALSE\n"],
    ["byte by byte", [..."STATUS\r\n"], "FALSE\n"],
    ["blanks", [" \t status \t\n"], "FALSE\n"],
    ["only the first line counts", ["HELLO\nSTATUS\nINFO\n"], "ERR Unknown Command\n"],
    ["nothing", [], "ERR Unknown Command\n"],
    ["a blank line", ["\n"], "ERR Unknown Command\n"],
    ["no text", [new Uint8Array([0xff, 0xfe, 0, 0x80, 10])], "ERR Unknown Command\n"],
    ["256 bytes", [`${" ".repeat(250)}STATUS\r\n`], "FALSE\n"],
    ["257 bytes", [`${" ".repeat(251)}STATUS\n`], "ERR Line Too Long\n"],
    ["257 bytes without an end", ["x".repeat(257)], "ERR Line Too Long\n"],
    ["a megabyte", ["x".repeat(2 ** 20)], "ERR Line Too Long\n"],
    ["a megabyte of blanks for a brace", [`${blanks}x`], "ERR Line Too Long\n"],
    ["a brace", ['{"jsonrpc":"2.0","id":1,"method":"ping"}\n'], '{"jsonrpc":"2.0","id":1,"result":{}}\n'],
    [
      "a brace behind blanks",
      [' \t{"jsonrpc":"2.0","id":1,"method":"ping"}\n'],
      '{"jsonrpc":"2.0","id":1,"result":{}}\n',
    ],
    ["a brace behind a letter", ["x{\n"], "ERR Unknown Command\n"],
    ["a brace in the second line", ["\n{\n"], "ERR Unknown Command\n"],
    ["blanks for a brace", ["  "], "ERR Unknown Command\n"],
    [
      "an HTTP request",
      ["POST / HTTP/1.1\r\nHost: x\r\n\r\n", '{"jsonrpc":"2.0","id":1,"method":"tools/list"}\n'],
      "ERR Unknown Command\n",
    ],
    ["64 KiB of MCP and more", [`{${"x".repeat(65_536)}`], "ERR Line Too Long\n"],
  ];
  test("each question gets its answer, in any pieces", async () => {
    await using breaker = await serve(free());
    for (const [name, pieces, expected] of questions) {
      expect([name, await talk(breaker.port, pieces)]).toEqual([name, expected]);
    }
  });

  test("100 silent clients delay nobody, 1,024 and one more get ERR Busy", async () => {
    await using breaker = await spawnBreaker(free(), withKey);
    const opened = await Promise.all(
      Array.from(
        { length: 1024 },
        () =>
          new Promise<ReturnType<typeof connect>>((resolve) => {
            const socket = connect({ port: breaker.port, host: "127.0.0.1" }, () => resolve(socket));
            socket.on("error", () => {});
          }),
      ),
    );
    expect(await breaker.ask("STATUS")).toBe("ERR Busy");
    for (const socket of opened.splice(100)) socket.destroy();
    await until(async () => (await breaker.ask("STATUS")) === "FALSE");
    for (const socket of opened) socket.destroy();
  });

  test("any bytes in any pieces get nothing but the answers of the protocol", async () => {
    await using breaker = await serve(free());
    let seed = 42;
    const random = (below: number) => (seed = (seed * 1103515245 + 12345) % 2 ** 31) % below;
    const allowed = /^(TRUE|FALSE|ERR Unknown Command|ERR Line Too Long|STATUS .*|\{.*|)$/;
    await Promise.all(
      Array.from({ length: 150 }, async () => {
        const bytes = Uint8Array.from({ length: random(600) }, () => random(256));
        const at = random(bytes.length + 1);
        const text = await talk(
          breaker.port,
          [bytes.subarray(0, at), bytes.subarray(at)].filter((piece) => piece.length > 0),
        );
        for (const line of text.split("\n")) expect(line).toMatch(allowed);
      }),
    );
    expect(await breaker.ask("STATUS")).toBe("FALSE");
  });

  test("a client that resets, or leaves before its answer, ends nothing", async () => {
    await using breaker = await serve(free());
    for (const piece of ["", "STA", "STATUS\n", "{"]) {
      const socket = connect({ port: breaker.port, host: "127.0.0.1" });
      socket.on("error", () => {});
      await new Promise((resolve) => socket.write(piece, resolve));
      socket.resetAndDestroy();
    }
    expect(await breaker.ask("STATUS")).toBe("FALSE");
  });

  test("a port in use exits with 69 and says so", async () => {
    await using breaker = await serve(free());
    const { code, err } = await run(["serve", "--host", "127.0.0.1", "--port", String(breaker.port), ...free()]);
    expect(code).toBe(69);
    expect(err).toContain(`Cannot listen at 127.0.0.1:${breaker.port}`);
  });

  const isElsewhere = second !== undefined || ALONE !== null;
  test.skipIf(!isElsewhere)(
    "INFO and MCP are for this machine, STATUS is for everybody (a second address, or unshare and ip)",
    async () => {
      const wrap = second === undefined ? (ALONE ?? []) : [];
      await using breaker = await spawnBreaker(["--drill", "--host", "0.0.0.0"], { wrap });
      const inside = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", String(breaker.pid)];
      const address = second ?? TEST_ADDRESS;
      /** What a client with the address `from` is told at the address `to`. */
      const askFrom = async (from: string, to: string, question: string) => {
        const client = `require("node:net")
          .connect({ port: ${breaker.port}, localAddress: "${from}", host: "${to}" })
          .on("data", (chunk) => process.stdout.write(chunk))
          .end('${question}\\n')`;
        const argv = [...(wrap.length > 0 ? inside : []), process.execPath, "-e", client];
        const child = leash(Bun.spawn(argv, { stdin: "ignore", stdout: "pipe", stderr: "inherit" }));
        const text = await new Response(child.stdout).text();
        expect(await child.exited).toBe(0);
        return text;
      };
      const call = '{"jsonrpc":"2.0","id":1,"method":"ping"}';
      const answers = await Promise.all([
        askFrom("127.0.0.1", "127.0.0.2", "INFO"),
        askFrom(address, address, "INFO"),
        askFrom(address, address, call),
        askFrom(address, "127.0.0.1", "INFO"),
        askFrom(address, "127.0.0.1", call),
        askFrom(address, "127.0.0.1", "STATUS"),
        askFrom(address, "127.0.0.1", "HELP"),
      ]);
      const refused = "ERR Not Allowed\n";
      const info = expect.stringContaining('"startedAt"');
      const help = expect.stringContaining("STATUS");
      const pong = '{"jsonrpc":"2.0","id":1,"result":{}}\n';
      const said = expect.stringMatching(/^(TRUE|FALSE)\n$/);
      expect(answers).toEqual([info, info, pong, refused, refused, said, help]);
    },
    15_000,
  );

  test("MCP takes at most half of the 1,024 connections", async () => {
    await using breaker = await spawnBreaker(free(), withKey);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    const answers = await Promise.all(
      Array.from({ length: 1024 }, async () => {
        const answered = Promise.withResolvers<string>();
        const socket = connect({ port: breaker.port, host: "127.0.0.1" });
        socket.on("data", (chunk) => answered.resolve(String(chunk))).on("error", answered.reject);
        socket.write(`${request(1, "ping")}\n`);
        return { socket, answer: await answered.promise };
      }),
    );
    const [busy, served] = ["ERR Busy\n", '{"jsonrpc":"2.0","id":1,"result":{}}\n'];
    const count = (text: string) => answers.filter(({ answer }) => answer === text).length;
    expect([count(served), count(busy)]).toEqual([512, 512]);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    expect(await breaker.info()).toMatchObject({ open: false });
    expect(await breaker.ask(request(1, "ping"))).toBe("ERR Busy");
    for (const { socket } of answers) socket.destroy();
    await until(async () => (await talk(breaker.port, [request(1, "ping")])) === served);
  });
});

suite("real clients", () => {
  const clients: [string, string][] = [
    ["nc", "printf 'STATUS\\n' | nc 127.0.0.1 PORT"],
    ["nc", "printf STATUS | nc -N 127.0.0.1 PORT"],
    ["ncat", "echo status | ncat 127.0.0.1 PORT"],
    ["socat", "echo STATUS | socat -t 20 - TCP:127.0.0.1:PORT"],
    ["busybox", "echo STATUS | busybox nc 127.0.0.1 PORT"],
    ["bash", "exec 3<>/dev/tcp/127.0.0.1/PORT; echo STATUS >&3; cat <&3"],
  ];
  for (const [program, command] of clients) {
    needs(program)(`${command}, also while the first look hangs`, async () => {
      using account = startHeldAccount();
      await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
      const early = sh(command.replace("PORT", String(breaker.port)));
      await until(() => account.requests.length === 1);
      await Bun.sleep(100); // the client has asked and half-closed by now
      account.release();
      expect(await early).toMatchObject({ code: 0, out: "FALSE\n" });
      expect(await sh(command.replace("PORT", String(breaker.port)))).toMatchObject({ code: 0, out: "FALSE\n" });
    });
  }
});

// ── The key ─────────────────────────────────────────────────────────────────────────────────────

/** A store of `pass` with a real gpg key, in a folder of its own. */
async function makeStore(passphrase = "") {
  const home = makeFolder();
  const env = { GNUPGHOME: join(home, "gnupg"), PASSWORD_STORE_DIR: join(home, "store"), HOME: home };
  mkdirSync(env.GNUPGHOME, { mode: 0o700 });
  const gpg = `gpg --batch --quiet --pinentry-mode loopback --passphrase '${passphrase}'`;
  const made = await sh(
    `${gpg} --quick-generate-key t@example.com future-default default never && pass init t@example.com`,
    env,
  );
  if (made.code !== 0) throw new Error(made.err);
  return {
    env,
    insert: (name: string, text: string) =>
      sh(`printf '%s\\n' "$TEXT" | pass insert -m -f '${name}'`, { ...env, TEXT: text }),
    async [Symbol.asyncDispose]() {
      await sh("gpgconf --kill all", env);
    },
  };
}

/** A folder with a program called `pass` that does what `body` says. */
function makePass(body: string): { PATH: string } {
  const folder = makeFolder();
  writeFileSync(join(folder, "pass"), `#!/bin/bash\n${body}\n`);
  chmodSync(join(folder, "pass"), 0o755);
  return { PATH: `${folder}:${process.env["PATH"]}` };
}

suite("the key", () => {
  const noKey = { OPENAI_ADMIN_KEY: "" };

  needsLinux("pass", "gpg")(
    "comes from real pass with a real gpg key, and appears nowhere but in the request (pass, gpg, Linux)",
    async () => {
      await using store = await makeStore();
      await store.insert("team/openai", `${KEY}\nuser: me`);
      const said = http({ error: { message: `Incorrect API key provided: ${KEY}` } }, { status: 401 });
      let answer = FREE;
      using account = startAccount(() => answer);
      const folder = makeFolder();
      const hook = `env > ${folder}/env; cat > ${folder}/stdin; sleep 1`;
      const argv = ["--base-url", account.base, "--source", "costs", "--pass-entry", "team/openai"];
      argv.push("--interval", "50ms", "--max-age", "1s", "--on-trip", hook);
      await using breaker = await spawnBreaker(argv, { env: { ...store.env, BUN_CONFIG_VERBOSE_FETCH: "1" } });
      expect(await breaker.ask("STATUS")).toBe("FALSE");
      expect(account.requests[0]?.headers.get("authorization")).toBe(`Bearer ${KEY}`);
      answer = said;
      await until(() => existsSync(`${folder}/stdin`) && readFileSync(`${folder}/stdin`, "utf8").includes("401"));
      const everywhere = [
        breaker.log(),
        await breaker.ask("INFO"),
        readFileSync(`${folder}/env`, "utf8"),
        readFileSync(`${folder}/stdin`, "utf8"),
      ];
      for (const name of readdirSync("/proc").filter((entry) => /^\d+$/.test(entry))) {
        for (const file of ["cmdline", "environ"]) {
          try {
            everywhere.push(readFileSync(`/proc/${name}/${file}`, "utf8"));
          } catch {} // It has ended, or is somebody else's.
        }
      }
      for (const text of everywhere) expect(text.includes(KEY.slice(3))).toBe(false);
      expect(breaker.log()).toContain("Cannot read the costs: HTTP 401; create an admin key");
    },
    20_000,
  );

  needs("pass", "gpg")(
    "is read afresh after a 401 (pass, gpg)",
    async () => {
      await using store = await makeStore();
      await store.insert("OPENAI_API_KEY", "old-key-0123456789");
      const isRight = (headers: Headers) => headers.get("authorization") === `Bearer ${KEY}`;
      using account = startAccount(({ headers }) => (isRight(headers) ? FREE : http("", { status: 401 })));
      const argv = ["--base-url", account.base, "--source", "costs", "--interval", "50ms"];
      await using breaker = await serve(argv, { env: { ...noKey, ...store.env } });
      await until(async () => (await breaker.info()).error);
      await store.insert("OPENAI_API_KEY", KEY);
      await until(async () => (await breaker.ask("STATUS")) === "FALSE");
    },
    20_000,
  );

  needs("pass", "gpg")(
    "reaches no hook in a variable of another name either (pass, gpg)",
    async () => {
      await using store = await makeStore();
      await store.insert("OPENAI_API_KEY", KEY);
      using account = startAccount(always(CENT));
      const file = join(makeFolder(), "env");
      const hook = `env > ${file}.part; mv ${file}.part ${file}`;
      const argv = ["--base-url", account.base, "--source", "costs", "--on-trip", hook];
      const env = { ...noKey, ...store.env, OPENAI_API_KEY: KEY, OTHER: "kept" };
      await using _breaker = await serve(argv, { env });
      const text = await until(() => existsSync(file) && readFileSync(file, "utf8"));
      expect(text).toContain("OTHER=kept");
      expect(text).not.toContain(KEY);
    },
    20_000,
  );

  needs("pass", "gpg")(
    "is missed with a sentence that says what to do (pass, gpg)",
    async () => {
      await using store = await makeStore();
      await store.insert("folder/one", KEY);
      await store.insert("prose", "two words");
      const cases: [string, Record<string, string>, string][] = [
        ["nowhere", store.env, "pass show nowhere failed, Error: nowhere is not in the password store.; install pass,"],
        ["folder", store.env, "the first line of folder in pass does not look like a key"],
        ["prose", store.env, "the first line of prose in pass does not look like a key"],
        ["any", { PATH: makeFolder() }, 'pass show any failed, Executable not found in $PATH: "pass"; install pass,'],
        ["any", makePass("echo boom >&2; exit 3"), "pass show any failed, boom; install pass, store an admin key with"],
        ["any", { OPENAI_ADMIN_KEY: "two words" }, "OPENAI_ADMIN_KEY does not look like a key"],
      ];
      for (const [entry, env, expected] of cases) {
        const { code, out } = await run(["check", "--pass-entry", entry], { env: { ...noKey, ...env } });
        expect([code, out]).toEqual([69, expect.stringContaining(`Cannot read the key: ${expected}`)]);
      }
    },
    20_000,
  );

  needs("pass", "gpg")(
    "that is locked with no terminal to ask at says how to unlock it (pass, gpg)",
    async () => {
      await using store = await makeStore("secret");
      await store.insert("OPENAI_API_KEY", KEY);
      await sh("gpgconf --kill gpg-agent", store.env);
      const { code, out } = await run(["check"], { env: { ...noKey, ...store.env } });
      expect(code).toBe(69);
      expect(out).toMatch(/pass show OPENAI_API_KEY failed, gpg: .*No secret key/);
      expect(out).toContain("or unlock it once in a terminal with: pass show OPENAI_API_KEY");
    },
    20_000,
  );

  test("what pass prints is told apart", async () => {
    const cases: [string, string][] = [
      [`echo '${KEY}'; echo 'user: me'`, ""],
      [
        "echo 'gpg: decryption failed: No secret key' >&2; exit 2",
        "pass show KEY failed, gpg: decryption failed: No secret key; install pass, store an admin key with: " +
          "pass insert KEY (or set OPENAI_ADMIN_KEY), or unlock it once in a terminal with: pass show KEY",
      ],
      ["echo boom >&2; exit 3", "pass show KEY failed, boom; install pass"],
      ["exit 3", "pass show KEY failed, exit code 3; install pass"],
      ["head -c 2000000 /dev/zero", "pass show KEY failed, it is over 1 MiB; install pass"],
      ["echo KEY; echo '└── one'", "the first line of KEY in pass does not look like a key"],
      ["head -c 300000 /dev/zero", "the first line of KEY in pass does not look like a key"],
      ["exit 0", "the first line of KEY in pass does not look like a key"],
    ];
    using account = startAccount(always(FREE));
    const argv = ["check", "--base-url", account.base, "--source", "costs", "--pass-entry", "KEY"];
    for (const [body, problem] of cases) {
      const { code, out } = await run(argv, { env: { ...noKey, ...makePass(body) } });
      const expected = problem
        ? [69, expect.stringContaining(`Cannot read the key: ${problem}`)]
        : [0, expect.stringContaining("closed")];
      expect([code, out]).toEqual(expected);
    }
    expect(account.requests.map(({ headers }) => headers.get("authorization"))).toEqual([`Bearer ${KEY}`]);
  });

  test("a pass that hangs leaves STATUS answering and no process behind", async () => {
    const folder = makeFolder();
    const env = makePass(`echo $$ > ${folder}/pid; sleep 60 & echo $! >> ${folder}/pid; wait`);
    const breaker = await serve(["--timeout", "100ms"], { env: { ...noKey, ...env } });
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    const readPids = () =>
      existsSync(`${folder}/pid`) ? readFileSync(`${folder}/pid`, "utf8").trim().split("\n").map(Number) : [];
    const pids = await until(() => (readPids().length === 2 ? readPids() : null));
    expect(pids.map(isRunning)).toEqual([true, true]);
    await breaker[Symbol.asyncDispose]();
    await until(() => !pids.some(isRunning));
  });
});

test.skipIf(!isLinux)(
  "a program that takes too long is killed with its group, also where one outside holds its output (Linux)",
  async () => {
    const file = join(makeFolder(), "pids");
    const script = `echo said; echo $$ > ${file}; sleep 60 & echo $! >> ${file}; setsid sleep 1 & wait`;
    const limits = { env: process.env, signal: new AbortController().signal, limitMs: 300 };
    await expect(runProgram(["bash", "-c", script], limits)).rejects.toThrow("it took longer than 0.3 s");
    const pids = readFileSync(file, "utf8").trim().split("\n").map(Number);
    expect(pids).toHaveLength(2);
    await until(() => !pids.some(isRunning));
  },
);

/** Whether a process runs; one that has ended and waits for its parent does not. */
function isRunning(pid: number): boolean {
  const state = Bun.spawnSync(["ps", "-o", "stat=", "-p", String(pid)])
    .stdout.toString()
    .trim();
  return state !== "" && !state.startsWith("Z");
}

// ── Commands, as processes ──────────────────────────────────────────────────────────────────────

interface Spawn {
  env?: Record<string, string>;
  script?: string;
  cwd?: string;
  stdin?: string;
}

/** Runs the script to its end in a process of its own. */
async function spawnCommand(argv: string[], { env = {}, script = SCRIPT, cwd = makeFolder(), stdin = "" }: Spawn = {}) {
  const child = leash(
    Bun.spawn([process.execPath, "--no-env-file", script, ...argv], {
      cwd,
      env: { PATH: process.env["PATH"], HOME: process.env["HOME"], ...env },
      stdin: Buffer.from(stdin),
      stdout: "pipe",
      stderr: "pipe",
    }),
  );
  const [out, err] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  return { code: await child.exited, out, err };
}

async function findFreePort(): Promise<string> {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  listener.stop(true);
  return String(listener.port);
}

/** Something that listens and says the same to whatever it is asked, or what `reply` makes of it. */
function startLiar(reply: string | ((question: string) => string)) {
  const answer = (question: string) => (typeof reply === "string" ? reply : reply(question));
  const socket = { data: (peer: Bun.Socket, chunk: Buffer) => void peer.end(answer(String(chunk))) };
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket });
  return { port: String(listener.port), [Symbol.dispose]: () => listener.stop(true) };
}

const withKey = { env: { OPENAI_ADMIN_KEY: KEY } };

/** Runs a command on a terminal of its own, by script; what is typed there may be control characters. */
function startTerminal(command: string, env: Record<string, string> = {}) {
  const child = leash(
    Bun.spawn(["script", "-qec", command, "/dev/null"], {
      env: { ...process.env, SHELL: "/bin/sh", ...env },
      stdio: ["pipe", "pipe", "ignore"],
    }),
  );
  let out = "";
  const reading = (async () => {
    for await (const chunk of child.stdout.pipeThrough(new TextDecoderStream())) out += chunk;
  })();
  return {
    out: () => out,
    type(text: string): void {
      child.stdin.write(text);
      child.stdin.flush();
    },
    async end(): Promise<void> {
      child.stdin.end();
      await Promise.all([child.exited, reading]);
    },
  };
}

suite("commands", () => {
  test("status prints the answer and exits with it", async () => {
    let answer = FREE;
    using account = startAccount(() => answer);
    await using breaker = await serve(["--base-url", account.base, "--source", "costs", "--interval", "20ms"]);
    const at = ["--port", String(breaker.port)];
    expect(await spawnCommand(["status", ...at])).toEqual({ code: 0, out: "FALSE\n", err: "" });
    answer = CENT;
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    expect(await run(["status", ...at])).toEqual({ code: 1, out: "TRUE\n", err: "" });
  });

  test("status with no breaker, or with something else at the port, is 69 and prints nothing", async () => {
    const port = await findFreePort();
    const { code, out, err } = await run(["status", "--port", port]);
    expect([code, out]).toEqual([69, ""]);
    expect(err).toContain(`No breaker answers at 127.0.0.1:${port}`);
    using liar = startLiar("+PONG\r\n");
    const said = await run(["status", "--port", liar.port]);
    expect([said.code, said.out]).toEqual([69, ""]);
    expect(said.err).toContain('answers "+PONG"; expected TRUE or FALSE');
    using mute = startLiar("");
    expect((await run(["status", "--port", mute.port])).err).toContain("closed without an answer");
    for (const text of ["x".repeat(3_000_000), `FALSE${"\n".repeat(3_000_000)}`]) {
      using endless = startLiar(text);
      expect((await run(["status", "--port", endless.port])).code).toBe(69);
    }
  });

  test("stop ends a breaker, and nothing that is none", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const info = await breaker.info();
    expect(info.pid).toBe(breaker.pid);
    const bystander = leash(Bun.spawn(["sleep", "60"]));
    using liar = startLiar(`${JSON.stringify({ ...info, pid: bystander.pid })}\n`);
    const refused = await run(["stop", "--port", liar.port]);
    expect([refused.code, refused.err]).toEqual([
      69,
      expect.stringContaining(`Process ${bystander.pid} is no breaker`),
    ]);
    expect(bystander.exitCode).toBeNull();
    bystander.kill();
    expect(await spawnCommand(["stop", "--port", String(breaker.port)])).toMatchObject({ code: 0, out: "" });
    expect(await breaker.child.exited).toBe(0);
    const again = await run(["stop", "--port", String(breaker.port)]);
    expect([again.code, again.err]).toEqual([69, expect.stringContaining("No breaker answers")]);
  });

  test.skipIf(!isLinux)("stop reads the longest arguments of a process at once (Linux)", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const bystander = leash(Bun.spawn(["sleep", "60"], { argv0: "bun".repeat(43_000) }));
    using liar = startLiar(`${JSON.stringify({ ...(await breaker.info()), pid: bystander.pid })}\n`);
    const before = process.cpuUsage();
    expect((await run(["stop", "--port", liar.port])).code).toBe(69);
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000).toBeLessThan(1000); // It takes 2.5 s where each "bun" of it is tried.
    bystander.kill();
  });

  test("stop takes no other program of Bun for a breaker", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const info = await breaker.info();
    const bystander = leash(Bun.spawn([process.execPath, "-e", "setInterval(() => {}, 1e6)", "breaker.ts"]));
    using liar = startLiar(`${JSON.stringify({ ...info, pid: bystander.pid })}\n`);
    expect((await run(["stop", "--port", liar.port])).code).toBe(69);
    using selfish = startLiar(`${JSON.stringify({ ...info, pid: process.pid })}\n`);
    expect((await run(["stop", "--port", selfish.port])).code).toBe(69);
    expect(bystander.exitCode).toBeNull();
    bystander.kill();
  });

  test("stop at one port does not end the breaker of another", async () => {
    using account = startAccount(always(FREE));
    const port = await findFreePort();
    const argv = ["--base-url", account.base, "--source", "costs", "--port", port];
    await using breaker = await spawnBreaker(argv, withKey);
    using liar = startLiar(`${JSON.stringify(await breaker.info())}\n`);
    const { code, err } = await run(["stop", "--port", liar.port]);
    expect([code, err]).toEqual([69, expect.stringContaining(`Process ${breaker.pid} is no breaker that runs here`)]);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    expect((await run(["stop", "--port", port])).code).toBe(0);
  });

  test("stop does not end an exec that something at the port names, its options first", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const argv = [process.execPath, SCRIPT, "--timeout", "5s", "exec", "--", "cat"];
    const env = { PATH: process.env["PATH"], HOME: process.env["HOME"], BREAKER_PORT: String(breaker.port) };
    const guarded = leash(Bun.spawn(argv, { env, cwd: makeFolder(), stdio: ["pipe", "pipe", "ignore"] }));
    guarded.stdin.write("ready\n");
    guarded.stdin.flush();
    await guarded.stdout.getReader().read();
    using liar = startLiar(`${JSON.stringify({ ...(await breaker.info()), pid: guarded.pid })}\n`);
    expect((await run(["stop", "--port", liar.port])).code).toBe(69);
    guarded.stdin.end();
    expect(await guarded.exited).toBe(0);
  });

  test("stop within this process waits until the breaker is gone", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    expect(await run(["stop", "--port", String(breaker.port)])).toEqual({ code: 0, out: "", err: "" });
    expect(isRunning(breaker.pid)).toBe(false);
  });

  test.each(["SIGTERM", "SIGINT"] as const)("%s ends the server with exit code 0", async (signal) => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const idle = connect({ port: breaker.port, host: "127.0.0.1" });
    idle.on("error", () => {});
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    breaker.child.kill(signal);
    expect(await breaker.child.exited).toBe(0);
  });

  test("a question under way is answered when the server stops", async () => {
    using account = startAccount(always(null));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const answer = breaker.ask("STATUS");
    expect(await breaker.ask("HELP")).toStartWith("STATUS"); // asked later, so the first one has arrived
    breaker.child.kill("SIGTERM");
    expect(await answer).toBe("TRUE");
  });

  test("the log keeps its order, and loses nothing", async () => {
    using account = startAccount(always(CENT));
    const argv = ["--base-url", account.base, "--source", "costs", "--on-trip", "seq 500; exit 3"];
    await using breaker = await spawnBreaker(argv, withKey);
    await until(() => breaker.log().includes("ended with exit code 3"));
    const numbers = breaker.log().matchAll(/--on-trip: (\d+)\n/g);
    expect(Array.from(numbers, ([, number]) => Number(number))).toEqual(Array.from({ length: 500 }, (_, at) => at + 1));
  });

  test.skipIf(!isLinux)("leaves the pipe of its log, which others may share, as it was (Linux)", async () => {
    const command = `"${process.execPath}" --no-env-file "${SCRIPT}" none; grep flags /proc/self/fdinfo/2 >&3`;
    const { out } = await sh(`{ ${command}; } 3>&1 2>&1 >/dev/null | cat`);
    const [, flags = ""] = /breaker: none: [^]*\nflags:\s*([0-7]+)\n$/.exec(out) ?? [];
    expect(flags).not.toBe("");
    expect(Number.parseInt(flags, 8) & constants.O_NONBLOCK).toBe(0);
  });

  needsLinux("script")("a terminal that was stopped (^S) stops nothing (script, Linux)", async () => {
    let answer = FREE;
    using account = startAccount(() => answer);
    const port = await findFreePort();
    const argv = ["--port", port, "--base-url", account.base, "--source", "costs", "--interval", "20ms"];
    const terminal = startTerminal([process.execPath, "--no-env-file", SCRIPT, ...argv].join(" "), withKey.env);
    await until(() => terminal.out().includes("FALSE, no cost"));
    terminal.type("\x13");
    const address = { host: "127.0.0.1", port: Number(port), timeoutMs: 2000 };
    const says = async (text: string) => (await ask("STATUS", address)) === text;
    for (const next of [CENT, FREE, CENT]) {
      answer = next; // Each change is logged.
      await until(() => says(next === CENT ? "TRUE" : "FALSE"));
    }
    expect(terminal.out().match(/ TRUE, /g) ?? []).toHaveLength(0);
    terminal.type("\x11");
    await until(() => terminal.out().match(/ TRUE, /g)?.length === 2);
    terminal.type("\x03");
    await terminal.end();
  });

  test.skipIf(!isLinux)("a log on a full disk stops nothing (Linux)", async () => {
    using account = startAccount(always(FREE));
    const port = await findFreePort();
    const argv = [process.execPath, SCRIPT, "--port", port, "--base-url", account.base, "--source", "costs"];
    const child = leash(
      Bun.spawn(["sh", "-c", 'exec "$0" "$@" 2>/dev/full', ...argv], {
        env: { PATH: process.env["PATH"], HOME: process.env["HOME"], OPENAI_ADMIN_KEY: KEY },
        cwd: makeFolder(),
        stdio: ["ignore", "ignore", "ignore"],
      }),
    );
    const address = { host: "127.0.0.1", port: Number(port), timeoutMs: 2000 };
    await until(async () => (await ask("STATUS", address).catch(() => "")) === "FALSE");
    child.kill();
    expect(await child.exited).toBe(0);
  });

  test("a log that nobody reads delays no answer, no hook and no end", async () => {
    let answer = FREE;
    using account = startAccount(() => answer);
    const port = await findFreePort();
    const file = join(makeFolder(), "tripped");
    const argv = ["--port", port, "--base-url", account.base, "--source", "costs", "--interval", "20ms"];
    argv.push("--on-reset", "head -c 60000 /dev/zero | tr '\\0' x | fold -w 200", "--on-trip", `echo trip >> ${file}`);
    // A pipe that is never read holds 64 KiB.
    const child = leash(
      Bun.spawn(["bash", "-c", 'exec "$0" "$@" 2> >(exec sleep 30)', process.execPath, SCRIPT, ...argv], {
        env: { PATH: process.env["PATH"], HOME: process.env["HOME"], OPENAI_ADMIN_KEY: KEY },
        cwd: makeFolder(),
        stdio: ["ignore", "ignore", "ignore"],
      }),
    );
    const address = { host: "127.0.0.1", port: Number(port), timeoutMs: 2000 };
    const becomes = (state: string) => until(async () => (await ask("STATUS", address).catch(() => "")) === state);
    for (let trips = 1; trips <= 4; trips++) {
      answer = CENT;
      await becomes("TRUE");
      await until(() => existsSync(file) && readFileSync(file, "utf8") === "trip\n".repeat(trips));
      answer = FREE;
      await becomes("FALSE");
    }
    child.kill();
    expect(await child.exited).toBe(0);
  }, 20_000);

  test.skipIf(!isLinux)("a verdict that cannot be printed is no success (Linux)", async () => {
    using account = startAccount(always(FREE));
    const command = `"${process.execPath}" "${SCRIPT}" check --base-url ${account.base} --source costs > /dev/full`;
    const { code, err } = await sh(command, { OPENAI_ADMIN_KEY: KEY });
    expect([code, err]).toEqual([69, expect.stringContaining("ENOSPC")]);
  });

  test("check that is interrupted leaves nothing behind", async () => {
    const folder = makeFolder();
    const env = { ...makePass(`echo $$ > ${folder}/pid; sleep 60`), HOME: String(process.env["HOME"]) };
    const child = leash(
      Bun.spawn([process.execPath, SCRIPT, "check"], {
        env,
        cwd: folder,
        stdio: ["ignore", "ignore", "ignore"],
      }),
    );
    const pid = Number(await until(() => existsSync(`${folder}/pid`) && readFileSync(`${folder}/pid`, "utf8")));
    child.kill("SIGINT");
    expect(await child.exited).toBe(69);
    await until(() => !isRunning(pid));
  });

  test("importing the script does nothing", async () => {
    const command = `"${process.execPath}" -e 'await import("${SCRIPT}"); console.log("imported")'`;
    expect(await sh(command, { BREAKER_PORT: "nonsense" })).toEqual({ code: 0, out: "imported\n", err: "" });
  });

  test.skipIf(!isLinux)("a request to loopback goes through no proxy (Linux)", async () => {
    using proxy = startAccount(always(FREE));
    using account = startAccount(always(FREE));
    const { origin } = new URL(proxy.base);
    const env = { OPENAI_ADMIN_KEY: KEY, HTTP_PROXY: origin, http_proxy: origin, no_proxy: "example.com" };
    const check = (base: string) => spawnCommand(["check", "--base-url", base, "--source", "costs"], { env });
    expect((await check(account.base)).code).toBe(0);
    await check(account.base.replace("127.0.0.1", "127.0.0.2")); // where nothing listens
    expect([proxy.requests.length, account.requests.length]).toEqual([0, 1]);
  });
});

// ── The drill, the lone file, the clock ─────────────────────────────────────────────────────────

const FAKETIME = ["x86_64", "aarch64"]
  .map((machine) => `/usr/lib/${machine}-linux-gnu/faketime/libfaketime.so.1`)
  .find((path) => existsSync(path));

suite("the drill and the clock", () => {
  test("check looks at the drill's account once, tokens too", async () => {
    const { code, out } = await run(["check", "--drill", "--allowance", "drill=120"]);
    expect([code, out]).toEqual([1, expect.stringContaining("open: 120 of 120 tokens of drill used")]);
  });

  test.skipIf(!FAKETIME)(
    "the lone file runs in an empty folder, without a network, 40 days on (faketime)",
    async () => {
      const cwd = makeFolder();
      const script = join(cwd, "breaker.ts");
      cpSync(SCRIPT, script);
      // The first run may fetch zod; after it, a proxy that nobody serves stands for a network that is gone.
      expect(await spawnCommand(["check", "--drill"], { script, cwd })).toMatchObject({ code: 0 });
      const offline = { HTTP_PROXY: "http://127.0.0.1:1", HTTPS_PROXY: "http://127.0.0.1:1" };
      expect(await spawnCommand(["check", "--drill"], { script, cwd, env: offline })).toMatchObject({ code: 0 });
      const later = { LD_PRELOAD: String(FAKETIME), FAKETIME: "+40d", ...offline };
      const { code, out } = await spawnCommand(["check", "--drill"], { script, cwd, env: later });
      expect([code, out]).toEqual([0, expect.stringContaining(formatDay(Date.now() + 40 * DAY))]);
    },
  );

  test.skipIf(!FAKETIME)(
    "at midnight UTC a cost of the day before yesterday is gone, one of yesterday stays (faketime)",
    async () => {
      const costs = [
        { day: "2026-03-09", value: 1 },
        { day: "2026-03-10", value: 0 },
      ];
      using account = startAccount(({ query }) => {
        const buckets = costs.map(({ day, value }) => ({
          start_time: Date.parse(day) / 1000,
          results: [{ amount: { value, currency: "usd" } }],
        }));
        return http(page(buckets.filter(({ start_time }) => start_time >= Number(query.get("start_time")))));
      });
      const clock = join(makeFolder(), "clock");
      const setClock = (text: string) => writeFileSync(clock, `@${text}\n`);
      setClock("2026-03-10 23:59:50");
      await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], {
        env: {
          OPENAI_ADMIN_KEY: KEY,
          TZ: "UTC",
          LD_PRELOAD: String(FAKETIME),
          FAKETIME_TIMESTAMP_FILE: clock,
          FAKETIME_NO_CACHE: "1",
          FAKETIME_DONT_FAKE_MONOTONIC: "1",
        },
      });
      expect(await breaker.info()).toMatchObject({ open: true, cost: { days: { "2026-03-09": 1, "2026-03-10": 0 } } });
      setClock("2026-03-11 00:00:10");
      await until(async () => (await breaker.ask("STATUS")) === "FALSE");
      costs.push({ day: "2026-03-11", value: 2 });
      setClock("2026-03-11 23:59:30");
      await until(async () => (await breaker.ask("STATUS")) === "TRUE");
      setClock("2026-03-12 00:00:30");
      await until(async () => (await breaker.info()).cost?.days["2026-03-12"] === 0);
      expect(await breaker.info()).toMatchObject({ open: true, cost: { days: { "2026-03-11": 2, "2026-03-12": 0 } } });
      setClock("2026-03-13 00:00:10");
      await until(async () => (await breaker.ask("STATUS")) === "FALSE");
    },
    20_000,
  );
});

// ── Hooks ───────────────────────────────────────────────────────────────────────────────────────

suite("hooks", () => {
  const quick = ["--source", "costs", "--interval", "20ms"];

  test("run in order, one at a time, on every change of the answer", async () => {
    let answer = CENT;
    using account = startAccount(() => answer);
    const file = join(makeFolder(), "log");
    const slow = `echo begin $BREAKER_OPEN >> ${file}; sleep 0.3; echo end $BREAKER_OPEN >> ${file}`;
    await using breaker = await serve(["--base-url", account.base, ...quick, "--on-trip", slow, "--on-reset", slow]);
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    answer = FREE;
    await until(async () => (await breaker.ask("STATUS")) === "FALSE");
    await until(() => existsSync(file) && readFileSync(file, "utf8").includes("end FALSE"));
    expect(readFileSync(file, "utf8")).toBe("begin TRUE\nend TRUE\nbegin FALSE\nend FALSE\n");
  });

  test("of the changes that come while one runs, only the newest waits", async () => {
    let answer = CENT;
    using account = startAccount(() => answer);
    const folder = makeFolder();
    const [file, go] = [join(folder, "log"), join(folder, "go")];
    const hold = `echo $BREAKER_OPEN >> ${file}; while [ ! -e ${go} ]; do sleep 0.02; done`;
    const argv = ["--base-url", account.base, ...quick, "--on-trip", hold, "--on-reset", `echo FALSE >> ${file}`];
    await using breaker = await serve(argv);
    const turn = async (to: string, text: string) => {
      answer = to;
      await until(async () => (await breaker.ask("STATUS")) === text);
    };
    await until(() => existsSync(file));
    for (let i = 0; i < 3; i++) {
      await turn(FREE, "FALSE");
      if (i < 2) await turn(CENT, "TRUE");
    }
    writeFileSync(go, "");
    await until(() => readFileSync(file, "utf8").includes("FALSE"));
    await turn(CENT, "TRUE");
    await until(() => readFileSync(file, "utf8").endsWith("FALSE\nTRUE\n"));
    expect(readFileSync(file, "utf8")).toBe("TRUE\nFALSE\nTRUE\n");
  });

  test("one that waits does not start after SIGTERM", async () => {
    let answer = CENT;
    using account = startAccount(() => answer);
    const file = join(makeFolder(), "log");
    const argv = ["--base-url", account.base, ...quick, "--on-trip", `echo trip >> ${file}; sleep 60`];
    await using breaker = await spawnBreaker([...argv, "--on-reset", `echo reset >> ${file}`], withKey);
    await until(() => existsSync(file));
    answer = FREE;
    await until(() => breaker.log().includes("FALSE, no cost")); // That is logged as the hook is queued.
    // A client that does not close after its answer keeps the breaker for a second.
    const slow = connect({ port: breaker.port, host: "127.0.0.1", allowHalfOpen: true });
    const answered = new Promise((resolve) => slow.on("data", resolve).on("error", () => {}));
    slow.write("STATUS\n");
    await answered;
    breaker.child.kill("SIGTERM");
    expect(await breaker.child.exited).toBe(0);
    slow.destroy();
    expect(readFileSync(file, "utf8")).toBe("trip\n");
    // One that starts and is killed before it does anything would be logged.
    await until(() => breaker.log().includes("--on-trip: killed"));
    expect(breaker.log()).not.toContain("--on-reset");
  });

  test("one that prints without end fills neither the log nor the time", async () => {
    using account = startAccount(always(CENT));
    await using breaker = await serve([
      "--base-url",
      account.base,
      ...quick,
      "--on-trip",
      "yes | head -n 500000; exit 3",
    ]);
    await until(() => breaker.logs.some((text) => text.includes("ended with exit code 3")));
    expect(breaker.logs.filter((text) => text.includes("--on-trip: y"))).toHaveLength(990);
  });

  test("one that fails is logged and changes nothing", async () => {
    using account = startAccount(always(CENT));
    await using breaker = await serve(["--base-url", account.base, ...quick, "--on-trip", "echo oops >&2; exit 3"]);
    await until(() => breaker.logs.some((line) => line.includes("--on-trip: ended with exit code 3")));
    expect(breaker.logs.some((line) => line.includes("--on-trip: oops"))).toBe(true);
    expect(await breaker.ask("STATUS")).toBe("TRUE");
  });

  test("a first answer of FALSE runs none", async () => {
    using account = startAccount(always(FREE));
    const file = join(makeFolder(), "reset");
    await using breaker = await serve(["--base-url", account.base, ...quick, "--on-reset", `touch ${file}`]);
    await until(() => account.requests.length > 5);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    expect(existsSync(file)).toBe(false);
  });

  test("one that hangs with a child of its own leaves neither behind", async () => {
    const file = join(makeFolder(), "pids");
    using account = startAccount(always(CENT));
    const hook = `echo $$ > ${file}; sleep 60 & echo $! >> ${file}; wait`;
    await using breaker = await spawnBreaker(["--base-url", account.base, ...quick, "--on-trip", hook], {
      env: { OPENAI_ADMIN_KEY: KEY },
    });
    const readPids = () => (existsSync(file) ? readFileSync(file, "utf8").trim().split("\n").map(Number) : []);
    const pids = await until(() => (readPids().length === 2 ? readPids() : null));
    expect(pids.map(isRunning)).toEqual([true, true]);
    breaker.child.kill("SIGTERM");
    await until(() => !pids.some(isRunning));
  });
});

// ── exec ────────────────────────────────────────────────────────────────────────────────────────

/** An account whose answer the test sets, and a breaker that looks at it every 50 ms. */
async function startGuarded(first: string) {
  const state = { answer: first };
  const account = startAccount(() => state.answer);
  const breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs", "--interval", "50ms"], withKey);
  return {
    state,
    breaker,
    at: ["--port", String(breaker.port)],
    async [Symbol.asyncDispose]() {
      await breaker[Symbol.asyncDispose]();
      account[Symbol.dispose]();
    },
  };
}

function spawnExec(argv: string[], env: Record<string, string> = {}) {
  return leash(
    Bun.spawn([process.execPath, SCRIPT, "exec", ...argv], {
      cwd: makeFolder(),
      env: { PATH: process.env["PATH"], HOME: process.env["HOME"], ...env },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    }),
  );
}

// These run at the same time, each with processes of its own.
suite("exec", () => {
  test.concurrent("ends with the exit code of its command", async () => {
    await using guarded = await startGuarded(FREE);
    const cases: [string[], number][] = [
      [["sh", "-c", "exit 7"], 7],
      [["true"], 0],
      [["sh", "-c", "kill -TERM $$"], 143],
      [["no-such-program-anywhere"], 127],
      [["/"], 126],
    ];
    for (const [argv, code] of cases) expect((await run(["exec", ...guarded.at, "--", ...argv])).code).toBe(code);
  });

  test.concurrent("refuses with the reason when the breaker is open, and without a breaker", async () => {
    await using guarded = await startGuarded(CENT);
    const file = join(makeFolder(), "ran");
    const refused = await run(["exec", ...guarded.at, "--", "touch", file]);
    expect([refused.code, refused.err]).toEqual([75, expect.stringContaining("touch was not started: 0.01 usd on 20")]);
    expect((await run(["exec", "--port", await findFreePort(), "--", "touch", file])).code).toBe(69);
    expect(existsSync(file)).toBe(false);
  });

  test.concurrent("stops its command when the breaker opens", async () => {
    await using guarded = await startGuarded(FREE);
    const file = join(makeFolder(), "started");
    const running = run(["exec", ...guarded.at, "--", "sh", "-c", `touch ${file}; sleep 60 & wait`]);
    await until(() => existsSync(file));
    guarded.state.answer = CENT;
    const { code, err } = await running;
    expect([code, err]).toEqual([75, expect.stringContaining("stopping sh: 0.01 usd")]);
  });

  test.concurrent("keeps what an impostor says off the terminal", async () => {
    const reason = "\x1b]0;pwned\x07\x1b[2J\u202eall is well";
    const reading = { ...UNSEEN, asOfMs: 0 };
    const info = {
      ...describeInfo({ now: 0, reading, options: optionsOf(), startedMs: 0, gateway: null }),
      open: true,
      message: reason,
    };
    using impostor = startLiar((line) => (line === "INFO\n" ? `${JSON.stringify(info)}\n` : "TRUE\n"));
    const { code, err } = await spawnCommand(["exec", "--port", impostor.port, "--", "true"]);
    expect([code, err]).toEqual([75, expect.stringContaining("all is well")]);
    expect(err).not.toMatch(/[^\P{C}\n]/u);
  });

  test.concurrent.skipIf(!isLinux)("within exec ends what both have started (Linux)", async () => {
    await using guarded = await startGuarded(FREE);
    const file = join(makeFolder(), "pid");
    const command = `setsid sh -c 'echo $$ > ${file}; exec sleep 50' > /dev/null 2>&1 & wait`;
    const inner = [process.execPath, SCRIPT, "exec", ...guarded.at, "--", "sh", "-c", command];
    const child = spawnExec([...guarded.at, "--", ...inner]);
    const pid = Number(await until(() => existsSync(file) && readFileSync(file, "utf8").trim()));
    guarded.state.answer = CENT;
    expect(await child.exited).toBe(75);
    await until(() => !isRunning(pid));
  });

  test.concurrent("hides the key from its command", async () => {
    await using guarded = await startGuarded(FREE);
    const OPENAI_BASE_URL = `https://relay.example/${KEY}/v1`;
    const variables = { OPENAI_ADMIN_KEY: KEY, COPY: KEY, OPENAI_BASE_URL, KEPT: "yes" };
    const child = spawnExec([...guarded.at, "--", "env"], variables);
    const out = await new Response(child.stdout).text();
    expect([out.includes(KEY), out.includes("OPENAI_ADMIN_KEY"), out.includes("KEPT=yes")]).toEqual([
      false,
      false,
      true,
    ]);
  });

  test.concurrent.each(["SIGINT", "SIGTERM", "SIGHUP", "SIGALRM"] as const)(
    "passes %s on and ends after its command",
    async (signal) => {
      await using guarded = await startGuarded(FREE);
      const name = signal.slice(3);
      const child = spawnExec([
        ...guarded.at,
        "--",
        "bash",
        "-c",
        `trap 'sleep 0.3; echo got ${name}; exit 9' ${name}; echo ready; while :; do sleep 0.05; done`,
      ]);
      const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
      expect((await reader.read()).value).toBe("ready\n");
      child.kill(signal);
      expect((await reader.read()).value).toBe(`got ${name}\n`);
      expect(await child.exited).toBe(9);
    },
  );

  needsLinux("script")(
    "leaves the terminal to its command, which gets one SIGINT of it (script, Linux)",
    async () => {
      await using guarded = await startGuarded(FREE);
      const inner =
        "n=0; trap 'n=$((n+1))' INT; test -t 0 && echo tty; read -r line; echo got:$line; sleep 1; echo ints:$n";
      const file = join(makeFolder(), "inner.sh");
      writeFileSync(file, inner);
      const command = `${process.execPath} ${SCRIPT} exec ${guarded.at.join(" ")} -- bash ${file}`;
      const terminal = startTerminal(command);
      await until(() => terminal.out().includes("tty"));
      terminal.type("hello\n");
      await until(() => terminal.out().includes("got:hello"));
      terminal.type("\x03");
      await until(() => terminal.out().includes("ints:"));
      expect(terminal.out()).toContain("ints:1");
      await terminal.end();
    },
    15_000,
  );
});

// ── MCP ─────────────────────────────────────────────────────────────────────────────────────────

const META = "io.modelcontextprotocol/";
const modern = (version: unknown = "2026-07-28") => ({
  [`${META}protocolVersion`]: version,
  [`${META}clientCapabilities`]: {},
});
const request = (id: unknown, method: string, params?: unknown) =>
  JSON.stringify({ jsonrpc: "2.0", id, method, params });
const serverInfo = { name: "breaker", version: VERSION };

interface Answer {
  id?: unknown;
  result?: Record<string, unknown>;
  error?: { code: number; message: string; data?: unknown };
  method?: string;
  params?: unknown;
}

suite("MCP", () => {
  /** Requests of all revisions, and what their answers hold; null for none. */
  const messages: [string, string, object | null][] = [
    [
      "initialize 2025-11-25",
      request(0, "initialize", {
        protocolVersion: "2025-11-25",
        capabilities: {},
        clientInfo: { name: "x", version: "1" },
      }),
      {
        id: 0,
        result: {
          protocolVersion: "2025-11-25",
          capabilities: { tools: {} },
          serverInfo,
          instructions: expect.any(String),
        },
      },
    ],
    [
      "initialize 2025-06-18",
      request("a", "initialize", { protocolVersion: "2025-06-18" }),
      { id: "a", result: { protocolVersion: "2025-06-18" } },
    ],
    [
      "initialize with an unknown version",
      request(1, "initialize", { protocolVersion: "1999-01-01" }),
      { id: 1, result: { protocolVersion: "2025-11-25" } },
    ],
    [
      "initialize with the version that has no handshake",
      request(1, "initialize", { protocolVersion: "2026-07-28" }),
      { id: 1, result: { protocolVersion: "2025-11-25" } },
    ],
    ["initialize without a version", request(1, "initialize", {}), { id: 1, error: { code: -32602 } }],
    ["ping", request(2, "ping"), { id: 2, result: {} }],
    [
      "tools/list",
      request(3, "tools/list", { _meta: { progressToken: 0 } }),
      {
        id: 3,
        result: {
          tools: [
            {
              name: "breaker_status",
              title: expect.any(String),
              description: expect.stringContaining("stop spending"),
              inputSchema: { type: "object", additionalProperties: false },
              outputSchema: { type: "object" },
              annotations: { readOnlyHint: true, openWorldHint: false },
            },
          ],
        },
      },
    ],
    ["tools/list with a cursor", request(3, "tools/list", { cursor: "x" }), { id: 3, error: { code: -32602 } }],
    [
      "tools/call",
      request("x-1", "tools/call", { name: "breaker_status", arguments: { any: 1 } }),
      { id: "x-1", result: { content: [{ type: "text" }], structuredContent: { open: false, reason: "none" } } },
    ],
    ["tools/call without a name", request(4, "tools/call", {}), { id: 4, error: { code: -32602 } }],
    ["tools/call without params", request(4, "tools/call"), { id: 4, error: { code: -32602 } }],
    ["tools/call of an unknown tool", request(4, "tools/call", { name: "x" }), { id: 4, error: { code: -32602 } }],
    ["an unknown method", request(5, "resources/list"), { id: 5, error: { code: -32601 } }],
    ["a method that is inherited", request(5, "__proto__"), { id: 5, error: { code: -32601 } }],
    ["server/discover without _meta", request(6, "server/discover"), { id: 6, error: { code: -32602 } }],
    ["subscriptions/listen without _meta", request(6, "subscriptions/listen", {}), { id: 6, error: { code: -32601 } }],
    ["params that are a list", request(6, "ping", []), { id: 6, error: { code: -32602 } }],
    ["_meta that is a string", request(6, "ping", { _meta: "x" }), { id: 6, error: { code: -32602 } }],
    [
      "server/discover",
      request("p1", "server/discover", { _meta: { ...modern(), [`${META}clientInfo`]: { name: "x", version: "1" } } }),
      {
        id: "p1",
        result: {
          resultType: "complete",
          supportedVersions: ["2026-07-28"],
          capabilities: { tools: {} },
          instructions: expect.any(String),
          ttlMs: 3_600_000,
          cacheScope: "public",
          _meta: { [`${META}serverInfo`]: serverInfo },
        },
      },
    ],
    [
      "modern tools/list",
      request(7, "tools/list", { _meta: modern() }),
      {
        id: 7,
        result: { resultType: "complete", ttlMs: 3_600_000, cacheScope: "public", tools: [{ name: "breaker_status" }] },
      },
    ],
    [
      "modern tools/call",
      request(8, "tools/call", { name: "breaker_status", _meta: modern() }),
      {
        id: 8,
        result: {
          resultType: "complete",
          structuredContent: { open: false },
          _meta: { [`${META}serverInfo`]: serverInfo },
        },
      },
    ],
    ["modern ping", request(9, "ping", { _meta: modern() }), { id: 9, error: { code: -32601 } }],
    [
      "modern initialize",
      request(9, "initialize", { _meta: modern(), protocolVersion: "2026-07-28" }),
      { id: 9, error: { code: -32601 } },
    ],
    [
      "a modern method with the word of the other era",
      request(9, "handshake ping", { _meta: modern() }),
      { id: 9, error: { code: -32601 } },
    ],
    [
      "an unsupported version",
      request(10, "tools/list", { _meta: modern("2099-01-01") }),
      { id: 10, error: { code: -32022, data: { supported: ["2026-07-28"], requested: "2099-01-01" } } },
    ],
    [
      "an unsupported version of an unknown method",
      request(10, "x", { _meta: modern("2025-11-25") }),
      { id: 10, error: { code: -32022 } },
    ],
    [
      "a version that is no string",
      request(10, "tools/list", { _meta: modern(1) }),
      { id: 10, error: { code: -32602 } },
    ],
    [
      "no capabilities",
      request(10, "tools/list", { _meta: { [`${META}protocolVersion`]: "2026-07-28" } }),
      { id: 10, error: { code: -32602 } },
    ],
    [
      "capabilities without a version",
      request(10, "tools/list", { _meta: { [`${META}clientCapabilities`]: {} } }),
      { id: 10, error: { code: -32602 } },
    ],
    [
      "subscriptions/listen",
      request(11, "subscriptions/listen", { _meta: modern(), notifications: { toolsListChanged: true } }),
      {
        method: "notifications/subscriptions/acknowledged",
        params: { _meta: { [`${META}subscriptionId`]: 11 }, notifications: {} },
      },
    ],
    [
      "subscriptions/listen without notifications",
      request(11, "subscriptions/listen", { _meta: modern() }),
      { id: 11, error: { code: -32602 } },
    ],
    ["an id that is null", request(null, "ping"), { error: { code: -32600 } }],
    ["an id that is fractional", request(1.5, "ping"), { error: { code: -32600 } }],
    [
      "an id beyond all integers",
      '{"jsonrpc":"2.0","id":9007199254740993,"method":"ping"}',
      { error: { code: -32600 } },
    ],
    ["an id and no method", '{"jsonrpc":"2.0","id":12}', { id: 12, error: { code: -32600 } }],
    ["another JSON-RPC", '{"jsonrpc":"1.0","id":12,"method":"ping"}', { id: 12, error: { code: -32600 } }],
    ["a batch", `[${request(1, "ping")}]`, { error: { code: -32600 } }],
    ["bad JSON", "{", { error: { code: -32700 } }],
    ["no JSON", "STATUS", { error: { code: -32700 } }],
    ["257 names", listMembers(257), { error: { code: -32700 } }],
    ["256 names, and no request", listMembers(256), { error: { code: -32600 } }],
    ["a notification", '{"jsonrpc":"2.0","method":"notifications/initialized"}', null],
    ["an unknown notification", '{"jsonrpc":"2.0","method":"nonsense","params":[1]}', null],
    [
      "a tool called as a notification",
      '{"jsonrpc":"2.0","method":"tools/call","params":{"name":"breaker_status"}}',
      null,
    ],
    [
      "a cancellation of nothing",
      '{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":77}}',
      null,
    ],
    ["an answer", '{"jsonrpc":"2.0","id":1,"result":{}}', null],
  ];
  test.each(messages)("%s", (_, message, expected) => {
    const info = describeInfo({
      now: 0,
      reading: { ...UNSEEN, asOfMs: 0 },
      options: optionsOf(),
      startedMs: 0,
      gateway: null,
    });
    const text = readMcp(message).reply(info);
    if (expected === null) expect(text).toBeNull();
    else expect(JSON.parse(text ?? "null")).toMatchObject(expected);
  });

  const expected = messages.flatMap(([, , answer]) => (answer === null ? [] : [answer]));
  const parse = (text: string): Answer[] =>
    text
      .trimEnd()
      .split("\n")
      .map((line) => JSON.parse(line));

  test("answers every message over TCP, all eras on one connection, in any pieces", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    await breaker.ask("STATUS");
    const first = request(0, "ping");
    const all = [first, ...messages.map(([, message]) => message)];
    const whole = Buffer.from(`${all.join("\r\n")}\n`);
    const pieces = Array.from({ length: Math.ceil(whole.length / 97) }, (_, i) => whole.subarray(i * 97, i * 97 + 97));
    for (const sent of [[whole], pieces]) {
      const answers = parse(await talk(breaker.port, sent));
      expect(answers).toMatchObject([{ id: 0, result: {} }, ...expected]);
      expect(answers).toHaveLength(expected.length + 1);
    }
  });

  test("answers every message over stdio, and ends with the input", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const stdin = messages.map(([, message]) => `${message}\n  \n`).join(""); // blank lines are passed over
    for (const start of [run, spawnCommand]) {
      const { code, out } = await start(["mcp", "--port", String(breaker.port)], { stdin });
      expect(code).toBe(0);
      const answers = parse(out);
      expect(answers).toMatchObject(expected);
      expect(answers).toHaveLength(expected.length);
    }
  });

  test("the structured result is INFO without the pid, mirrored as text", async () => {
    using account = startAccount(always(CENT));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const { pid, ageSeconds, ...info } = await breaker.info();
    const [answer] = parse(await talk(breaker.port, [request(1, "tools/call", { name: "breaker_status" })]));
    const { structuredContent, content } = answer?.result ?? {};
    expect(structuredContent).toMatchObject(info);
    expect(structuredContent).not.toHaveProperty("pid");
    expect(content).toEqual([{ type: "text", text: JSON.stringify(structuredContent) }]);
    expect([pid, ageSeconds]).toEqual([process.pid, 0]);
  });

  test("5,000 requests for the list of tools keep nobody waiting", () => {
    const line = request(1, "tools/list");
    // Processor time, the least of three; it takes 0.6 s where the list is made for each.
    const times = [1, 2, 3].map(() => {
      const before = process.cpuUsage();
      for (let i = 0; i < 5000; i++) readMcp(line);
      const { user, system } = process.cpuUsage(before);
      return (user + system) / 1000;
    });
    expect(Math.min(...times)).toBeLessThan(300);
  });

  test("a multibyte character cut in two survives", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const bytes = Buffer.from(`${request("é😀", "ping")}\n`);
    const answers = parse(
      await talk(
        breaker.port,
        Array.from(bytes, (byte) => Uint8Array.of(byte)),
      ),
    );
    expect(answers).toMatchObject([{ id: "é😀", result: {} }]);
  });

  test("a call waits for the first look, what came before it does not, and what comes behind waits its turn", async () => {
    using account = startHeldAccount();
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const call = (id: number) => request(id, "tools/call", { name: "breaker_status" });
    const cancel = '{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":2}}';
    const socket = connect({ port: breaker.port, host: "127.0.0.1" });
    let text = "";
    const ended = new Promise((resolve) => socket.on("data", (chunk) => (text += chunk)).on("end", resolve));
    socket.end([request(1, "ping"), call(2), cancel, request(3, "ping"), call(4)].join("\n"));
    await until(() => text.includes("\n") && account.requests.length === 1);
    expect(parse(text)).toMatchObject([{ id: 1, result: {} }]);
    account.release();
    await ended;
    const closed = { structuredContent: { open: false } };
    expect(parse(text).slice(1)).toMatchObject([
      { id: 2, result: closed },
      { id: 3, result: {} },
      { id: 4, result: closed },
    ]);
  });

  test("a line over 64 KiB ends the connection with one error, after the answers before it", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    const long = `{${"x".repeat(65_600)}`;
    const text = await talk(breaker.port, [`${request(1, "ping")}\n${long}\n${request(2, "ping")}\n`]);
    expect(text).toBe('{"jsonrpc":"2.0","id":1,"result":{}}\nERR Line Too Long\n');
    const { code, out } = await run(["mcp"], { stdin: `${request(1, "ping")}\n${long}` });
    expect(code).toBe(0);
    expect(parse(out)).toMatchObject([{ id: 1, result: {} }, { error: { code: -32600 } }]);
  });

  test("with no breaker the tool says open, unknown and why", async () => {
    const stdin = `${request(1, "tools/call", { name: "breaker_status" })}\n`;
    const { code, out } = await run(["mcp", "--when-unknown", "false", "--port", await findFreePort()], { stdin });
    expect(code).toBe(0);
    expect(parse(out)).toMatchObject([
      {
        id: 1,
        result: {
          structuredContent: { open: true, reason: "unknown", message: expect.stringContaining("No breaker answers") },
        },
      },
    ]);
  });

  test("a client that does not read is not read from, and its answers arrive when it does", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await serve(["--base-url", account.base, "--source", "costs"]);
    await breaker.ask("STATUS");
    const count = 20_000;
    const socket = connect({ port: breaker.port, host: "127.0.0.1", allowHalfOpen: true });
    socket.pause();
    socket.write(
      Array.from({ length: count }, (_, id) => `${request(id, "tools/call", { name: "breaker_status" })}\n`).join(""),
    );
    socket.end();
    await until(() => socket.bytesWritten > 0);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    let lines = 0;
    const ended = Promise.withResolvers<void>();
    socket.on("data", (chunk) => (lines += String(chunk).split("\n").length - 1)).on("end", () => ended.resolve());
    socket.resume();
    await ended.promise;
    socket.destroy();
    expect(lines).toBe(count);
  });
});

// ── The gateway ─────────────────────────────────────────────────────────────────────────────────
// Programs reach a simulated OpenAI through it, by real HTTP.

interface Call {
  method: string;
  url: string;
  headers: IncomingHttpHeaders;
  body: string;
  /** When the client was gone before the answer had ended, ms on the monotonic clock. */
  goneMs: number | null;
}

type Reply = (call: Call, response: ServerResponse) => void;

/** A simulated OpenAI: `reply` answers what is no look of the breaker; `look` gives the body of those. */
async function startOpenAi(reply: Reply, look: (path: string) => unknown = () => page([])) {
  const calls: Call[] = [];
  const keys = new Set<string | undefined>();
  const server = createServer((request, response) => {
    const chunks: Buffer[] = [];
    const { method = "", url = "", headers } = request;
    response.sendDate = false; // It would contradict the clock of a test.
    if (url.startsWith("/v1/organization/")) {
      keys.add(headers.authorization);
      return void response.end(JSON.stringify(look(url)));
    }
    const call: Call = { method, url, headers, body: "", goneMs: null };
    calls.push(call);
    response.on("close", () => {
      if (!response.writableEnded) call.goneMs = performance.now();
    });
    request.on("error", () => {});
    request.on("data", (chunk: Buffer) => chunks.push(chunk));
    request.on("end", () => {
      call.body = Buffer.concat(chunks).toString("latin1");
      reply(call, response);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  const port = typeof address === "object" ? address?.port : 0;
  return {
    calls,
    /** Those that the looks came with. */
    keys,
    base: `http://127.0.0.1:${port}/v1`,
    [Symbol.dispose]() {
      server.closeAllConnections();
      server.close();
    },
  };
}

const json =
  (body: unknown, status = 200): Reply =>
  (_, response) =>
    response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));

/** Answers with events, whose bytes go out in pieces of `size`. */
const events =
  (list: (object | string)[], { size = Infinity, newline = "\n" } = {}): Reply =>
  async (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8" });
    const bytes = Buffer.from(formatEvents(list, newline));
    for (let at = 0; at < bytes.length; at += size) {
      response.write(bytes.subarray(at, Math.min(at + size, bytes.length)));
      if (size < bytes.length) await new Promise(setImmediate);
    }
    response.end();
  };

function formatEvents(list: (object | string)[], newline = "\n"): string {
  const data = list.map((event) => (typeof event === "string" ? event : JSON.stringify(event)));
  return data.map((text) => `data: ${text}${newline}${newline}`).join("");
}

const MODEL = "gpt-4o-mini-2024-07-18";
let lastId = 0;
const nextId = () => `id-${++lastId}`;
const seconds = () => Math.floor(Date.now() / 1000);
const promptUsage = { prompt_tokens: 90, completion_tokens: 30, total_tokens: 120 };
const inputUsage = { input_tokens: 90, output_tokens: 30, total_tokens: 120 };
const chat = (more: object = {}) => ({
  id: nextId(),
  object: "chat.completion",
  created: seconds(),
  model: MODEL,
  choices: [{ index: 0, message: { role: "assistant", content: 'the "usage" of é😀' }, finish_reason: "stop" }],
  usage: promptUsage,
  ...more,
});
const response = (more: object = {}) => ({
  id: nextId(),
  object: "response",
  created_at: seconds(),
  model: MODEL,
  status: "completed",
  output: [],
  usage: inputUsage,
  ...more,
});
/** A chat stream, with or without the event that tells the usage. */
function chunks({ isAsked }: { isAsked: boolean }) {
  const { usage, ...about } = chat({ object: "chat.completion.chunk" });
  const none = isAsked ? { usage: null } : {};
  const deltas = ["Hel", "lo é😀", ""].map((content) => ({
    ...about,
    choices: [{ index: 0, delta: { content } }],
    ...none,
  }));
  return [...deltas, ...(isAsked ? [{ ...about, choices: [], usage }] : []), "[DONE]"];
}

/** A breaker with a gateway, in front of `openai`. */
async function serveGateway(openai: { base: string }, argv: string[] = ["--allowance", "*=1M"], now = Date.now) {
  const breaker = await serve(["--base-url", openai.base, "--source", "costs", "--gateway", "0", ...argv], { now });
  const { gateway } = await breaker.info();
  if (!gateway) throw new Error("no gateway");
  return {
    ...breaker,
    gateway,
    post: (path: string, body: unknown, init: BunFetchRequestInit = {}) =>
      fetch(`${gateway}${path}`, {
        method: "POST",
        body: typeof body === "string" ? body : JSON.stringify(body),
        headers: { "content-type": "application/json", authorization: "Bearer sk-client" },
        ...init,
      }),
    used: async () => (await breaker.info()).allowances[0]?.used,
  };
}

/** All bytes that come back for a raw request. */
function talkHttp(url: string, head: string[], body: string | Buffer = ""): Promise<string> {
  const { port, hostname } = new URL(url);
  return new Promise((resolve, reject) => {
    const socket = connect({ port: Number(port), host: hostname });
    let text = "";
    socket.setTimeout(10_000, () => reject(new Error(`nothing more after ${text}`)));
    socket.on("data", (chunk) => (text += chunk.toString("latin1")));
    socket.on("close", () => resolve(text));
    socket.on("error", reject);
    socket.write(`${head.join("\r\n")}\r\n\r\n`);
    socket.write(body);
  });
}

suite("passing on", () => {
  const stream = `: a comment\ndata: {"a":1}\n\ndata: two\r\ndata: lines\r\n\r\nevent: x\ndata: 3\n\n`;
  const cut = (text: string) => [...text.matchAll(EVENTS)].map(([event]) => event);
  test("a stream is cut into the same events wherever its bytes are cut", () => {
    const whole = cut(`${stream}data: [DO`);
    expect(whole).toEqual([
      `: a comment\ndata: {"a":1}\n\n`,
      "data: two\r\ndata: lines\r\n\r\n",
      "event: x\ndata: 3\n\n",
    ]);
    expect(cut("data: 1\n\n\n\r\ndata: 2\n\ndata")).toEqual(["data: 1\n\n", "\n\r\n", "data: 2\n\n"]);
    expect(cut("\r\r\ndata: 1\n\n")).toEqual(["\r\r\n", "data: 1\n\n"]);
    expect(cut(`${"\n".repeat(2 ** 22)}data: 1\n\n`).length).toBe(2);
    for (let at = 0; at <= stream.length; at++) {
      const first = cut(stream.slice(0, at));
      const second = cut(stream.slice(first.join("").length));
      expect([...first, ...second]).toEqual(whole);
    }
  });

  const parsed: [string, unknown][] = [
    [`data: {"a":1}\n\n`, { a: 1 }],
    [`data:{"a":1}\r\n\r\n`, { a: 1 }],
    [`: hello\nevent: x\nid: 7\ndata: {"a":\ndata: 1}\n\n`, { a: 1 }],
    [`data: {"a":1}`, { a: 1 }],
    ["data: [DONE]\n\n", undefined],
    [": only a comment\n\n", undefined],
    ["", undefined],
    [`{\n"a":\n\n1}`, { a: 1 }],
    [Buffer.from('{"a":"é😀"}').toString("latin1"), { a: "é😀" }],
    ["{", undefined],
  ];
  test.each(parsed)("of %j the JSON is %j", (text, expected) => {
    expect(readJson(text)).toEqual(expected);
  });

  const wishes: [string, string | null][] = [
    ['{"stream":true}', '{"stream_options":{"include_usage":true},"stream":true}'],
    [' {\n "stream": true, "n": 1.0}', ' {"stream_options":{"include_usage":true},\n "stream": true, "n": 1.0}'],
    ['{"stream":true,"stream_options":null}', '{"stream":true,"stream_options":{"include_usage":true}}'],
    ['{"stream":true,"stream_options":{}}', '{"stream":true,"stream_options":{"include_usage":true}}'],
    [
      '{"stream_options" : { "include_usage": false, "x": 1 },"stream":true,"seed":12345678901234567890}',
      '{"stream_options":{"include_usage":true,"x":1},"stream":true,"seed":12345678901234567890}',
    ],
    ['{"stream":true,"stream_options":{"include_usage":true}}', null],
    ['{"stream":false}', null],
    ['{"stream":"true"}', null],
    ["{}", null],
    ["", null],
    ["[]", null],
    ['{"stream":true', null],
    // Its bytes would be others.
    ['{"stream":true,"stream_options":{"x":"\\u20ac"}}', null],
    // Nothing is touched where the wish would land in another object.
    ['{"a":{"stream_options":{}},"stream":true,"stream_options":{"y":{}}}', null],
    ['{"a":{"stream_options":null},"stream":true,"stream_options":null}', null],
    ['{"stream":true,"stream_options":{"x":"}"}}', null],
    [
      '{"a":"stream_options","stream":true,"stream_options":{"x":[1,"y"]},"n":1}',
      '{"a":"stream_options","stream":true,"stream_options":{"x":[1,"y"],"include_usage":true},"n":1}',
    ],
    [
      '{"messages":[{"content":"\\"stream\\":true $& $1"}],"stream":true}',
      '{"stream_options":{"include_usage":true},"messages":[{"content":"\\"stream\\":true $& $1"}],"stream":true}',
    ],
  ];
  test.each(wishes)("%j asks for its usage as %j", (body, expected) => {
    expect(askForUsage(body)).toBe(expected);
  });

  test("is read with 390,000 commas in a text, or 20 likely tokens for each of 1,500", () => {
    expect(askForUsage(JSON.stringify({ stream: true, data: "1,".repeat(390_000) }))).toContain("include_usage");
    const likely = (index: number) => ({ token: ` ${index}`, logprob: -1.5, bytes: [1, 2, 3, 4, 5] });
    const top = (from: number) => Array.from({ length: 20 }, (_, i) => likely(from + i));
    const content = Array.from({ length: 1500 }, (_, i) => ({ ...likely(20 * i), top_logprobs: top(20 * i) }));
    const text = JSON.stringify({ ...chat(), choices: [{ index: 0, logprobs: { content } }] });
    expect(AnswerSchema.parse(readJson(text))).toMatchObject({ usage: 120 });
  });

  test("is not read with 100,000 members, 400,000 items, 5,000 names or short texts, 50,000 of 500", () => {
    const lists = (length: number, item: unknown) => readJson(JSON.stringify(Array<unknown>(length).fill(item)));
    const named = (length: number) => readJson(`[${Array(100).fill(listMembers(length)).join()}]`);
    const texts = (length: number, end: string) =>
      readJson(JSON.stringify(Array.from({ length }, (_, i) => `${i}`.padStart(8) + end)));
    const short = ["x".repeat(8), '"\\\u0001\n'];
    const read = [lists(99_000, { "a\\": 0 }), lists(399_000, 0), readJson(listMembers(5000)), named(500)];
    expect(read).not.toContain(undefined);
    expect([...short.map((end) => texts(5000, end)), texts(20_000, "x".repeat(9))]).not.toContain(undefined);
    const unread = [lists(101_000, { a: 0 }), lists(401_000, 0), readJson(listMembers(5001)), named(501)];
    expect(unread).toEqual(Array(4).fill(undefined));
    expect(short.map((end) => texts(5001, end))).toEqual([undefined, undefined]);
  });

  const spendings: [string, unknown, [number | null, string] | null][] = [
    ["a chat", chat(), [120, MODEL]],
    ["the last event of a chat stream", chat({ object: "chat.completion.chunk", choices: [] }), [120, MODEL]],
    ["another event of it", chat({ usage: null }), [null, MODEL]],
    ["an event without usage", chat({ usage: undefined }), [null, MODEL]],
    ["a legacy completion", chat({ object: "text_completion" }), [120, MODEL]],
    ["a response", response(), [120, MODEL]],
    ["the event response.completed", { type: "response.completed", response: response() }, [120, MODEL]],
    ["the event response.incomplete", { type: "response.incomplete", response: response() }, [120, MODEL]],
    ["the event response.created", { type: "response.created", response: response({ usage: null }) }, [null, MODEL]],
    ["a compaction", response({ object: "response.compaction", model: undefined }), [120, "compaction"]],
    ["a step of a run", response({ object: "thread.run.step", model: undefined }), null],
    ["a queued response", response({ status: "queued", usage: null }), [null, MODEL]],
    [
      "an assistant's run",
      { id: "run", object: "thread.run", created_at: 1.7e9, model: "m", usage: promptUsage },
      [120, "m"],
    ],
    [
      "usage with details",
      chat({ usage: { ...promptUsage, prompt_tokens_details: { cached_tokens: 80 } } }),
      [120, MODEL],
    ],
    [
      "a completion that generated nothing",
      chat({ object: "text_completion", usage: { prompt_tokens: 90, total_tokens: 90 } }),
      [90, MODEL],
    ],
    ["embeddings", { object: "list", model: "m", data: [], usage: { prompt_tokens: 8, total_tokens: 8 } }, null],
    ["images", { created: 1.7e9, data: [], usage: inputUsage }, null],
    ["a transcription", { text: "x", usage: { type: "tokens", ...inputUsage } }, null],
    ["a model", { id: "gpt-4o", object: "model", owned_by: "openai" }, null],
    ["tokens below 0", chat({ usage: { prompt_tokens: -1, completion_tokens: 3 } }), [null, MODEL]],
    ["tokens as text", chat({ usage: { prompt_tokens: "1", completion_tokens: 3 } }), [null, MODEL]],
    ["a model with an odd length", response({ model: { length: { toString: 1 } } }), null],
    ["an error", { error: { message: "x" } }, null],
    ["a list", [chat()], null],
    ["nothing", undefined, null],
  ];
  test.each(spendings)("what %s tells of its tokens", (_, body, expected) => {
    const told = AnswerSchema.safeParse(body).data;
    expect(told ? [told.usage, told.model] : null).toEqual(expected);
  });

  test("headers of the connection stay behind, and whatever Connection names", () => {
    const headers = new Headers({
      Connection: "keep-alive, X-Mine",
      "X-Mine": "1",
      "Keep-Alive": "5",
      TE: "x",
      Host: "h",
      Expect: "100-continue",
      "Transfer-Encoding": "chunked",
    });
    headers.append("Set-Cookie", "a=1");
    headers.append("Set-Cookie", "b=2");
    headers.set("X-Kept", "yes");
    const passed = passHeaders(headers);
    expect([...passed.keys()].sort()).toEqual(["set-cookie", "set-cookie", "x-kept"]);
    expect(passed.getSetCookie()).toEqual(["a=1", "b=2"]);
  });

  const screened: [string, Record<string, string>, number | null][] = [
    ["/v1/models", { host: "127.0.0.1:7" }, null],
    ["/v1/models", { host: "LocalHost:7" }, null],
    ["/v1/models", { host: "[::1]:7", "sec-fetch-mode": "cors" }, null],
    ["/v1/models", { host: "127.0.0.1:8" }, 403],
    ["/v1/models", { host: "127.0.0.1:80" }, 403],
    ["/v1/models", { host: "127.0.0.1" }, 403],
    ["/v1/models", { host: "evil.example:7" }, 403],
    ["/v1/models", { host: "localhost.evil.example:7" }, 403],
    ["/v1/models", { host: "127.0.0.1:7@evil.example" }, 403],
    ["/v1/models", {}, 403],
    ["/v1/models", { host: "127.0.0.1:7", origin: "http://evil.example" }, 403],
    ["/v1/models", { host: "127.0.0.1:7", origin: "null" }, 403],
    ["/v1/models", { host: "127.0.0.1:7", "sec-fetch-site": "none" }, 403],
    ["/models", { host: "127.0.0.1:7" }, 404],
    ["/v1", { host: "127.0.0.1:7" }, 404],
    ["/v10/models", { host: "127.0.0.1:7" }, 404],
    ["/v1/../admin", { host: "127.0.0.1:7" }, 404],
    ["/v1/%2e%2e/admin", { host: "127.0.0.1:7" }, 404],
    ["/v1/responses", { host: "127.0.0.1:7", upgrade: "WebSocket", connection: "Upgrade" }, 426],
  ];
  test.each(screened)("%s with %j is refused with %p", (path, headers, expected) => {
    const refusal = screen({ url: `http://127.0.0.1:7${path}`, headers: new Headers(headers) }, 7);
    expect(refusal?.status ?? null).toBe(expected);
    if (refusal) expect(refusal.headers.get("x-should-retry")).toBe("false");
  });

  test("at port 80, a Host has no port", () => {
    const ask = (host: string) => screen({ url: "http://127.0.0.1/v1/models", headers: new Headers({ host }) }, 80);
    expect(["127.0.0.1", "localhost", "evil.example"].map((host) => ask(host)?.status)).toEqual([
      undefined,
      undefined,
      403,
    ]);
  });
});

test("a clock that is set back by a part of --max-age makes no look younger", async () => {
  let [answer, shiftMs] = [FREE, 0];
  using account = startAccount(() => answer);
  const argv = ["--base-url", account.base, "--source", "costs", "--max-age", "5s", "--interval", "1h"];
  await using breaker = await serve(argv, { now: () => Date.now() + shiftMs });
  expect(await breaker.ask("STATUS")).toBe("FALSE");
  answer = http("", { status: 500 });
  shiftMs = -3000;
  expect(await breaker.ask("STATUS")).toBe("TRUE");
});

suite("the gateway", () => {
  test("passes a request and its answer on as they are, with the client's key and never the breaker's", async () => {
    using openai = await startOpenAi((_, response) => {
      response.writeHead(207, "Odd", { "X-Odd": "a", "Set-Cookie": ["a=1", "b=2"], "Keep-Alive": "timeout=9" });
      response.end(Buffer.from([0, 255, 13, 10, 128]));
    });
    await using breaker = await serveGateway(openai);
    const head = ["PUT /v1/files/a%2Fb?q=%20x&q=2 HTTP/1.1", `Host: ${new URL(breaker.gateway).host}`];
    head.push(
      "Authorization: Bearer sk-client",
      "Connection: close, X-Mine",
      "X-Mine: 1",
      "X-Kept: yes",
      "Accept-Encoding: br",
    );
    head.push("Content-Length: 5");
    const text = await talkHttp(breaker.gateway, head, Buffer.from([1, 2, 255, 0, 10]));
    expect(text).toStartWith("HTTP/1.1 207");
    expect(text.toLowerCase()).toContain("set-cookie: a=1\r\nset-cookie: b=2");
    expect(text).toContain("\0\xff\r\n\x80");
    expect(text).not.toContain("timeout=9");
    const [call] = openai.calls;
    expect(call).toMatchObject({ method: "PUT", url: "/v1/files/a%2Fb?q=%20x&q=2", body: "\x01\x02\xff\0\n" });
    expect(call?.headers).toMatchObject({
      authorization: "Bearer sk-client",
      "x-kept": "yes",
      "accept-encoding": "identity",
    });
    expect(call?.headers["content-length"]).toBe("5");
    expect(call?.headers["x-mine"]).toBeUndefined();
    expect(call?.headers.host).toBe(new URL(openai.base).host);
    expect(JSON.stringify(openai.calls)).not.toContain(KEY);
  });

  test("passes redirects, errors, compressed bodies and answers without a body on", async () => {
    const packed = Bun.gzipSync(Buffer.from(JSON.stringify(chat())));
    const replies: Reply[] = [
      (_, response) => response.writeHead(307, { location: "https://elsewhere.example/" }).end(),
      json({ error: { message: "slow down" } }, 429),
      (_, response) =>
        response.writeHead(200, { "content-type": "application/json", "content-encoding": "gzip" }).end(packed),
      (_, response) => response.writeHead(204).end(),
    ];
    using openai = await startOpenAi((call, response) => replies.shift()?.(call, response));
    await using breaker = await serveGateway(openai);
    const ask = () => fetch(`${breaker.gateway}/models`, { redirect: "manual", decompress: false });
    const redirect = await ask();
    expect([redirect.status, redirect.headers.get("location")]).toEqual([307, "https://elsewhere.example/"]);
    const error = await ask();
    expect([error.status, await error.json()]).toEqual([429, { error: { message: "slow down" } }]);
    const compressed = await ask();
    expect(compressed.headers.get("content-encoding")).toBe("gzip");
    expect(Buffer.from(await compressed.arrayBuffer())).toEqual(Buffer.from(packed));
    expect((await ask()).status).toBe(204);
    expect(await breaker.used()).toBe(0);
  });

  /** What is asked, what comes back, and the tokens that count. */
  const counted: [string, string, object, Reply, number][] = [
    ["a chat", "/chat/completions", {}, json(chat()), 120],
    [
      "an answer whose encoding is Identity",
      "/responses",
      {},
      (_, res) =>
        res
          .writeHead(200, { "content-type": "application/json", "content-encoding": "Identity" })
          .end(JSON.stringify(response())),
      120,
    ],
    [
      "a compaction",
      "/responses/compact",
      {},
      json(response({ object: "response.compaction", model: undefined })),
      120,
    ],
    [
      "a chat as a stream that asks",
      "/chat/completions",
      { stream: true, stream_options: { include_usage: true } },
      events(chunks({ isAsked: true })),
      120,
    ],
    ["a response", "/responses", {}, json(response()), 120],
    [
      "a response as a stream",
      "/responses",
      { stream: true },
      events([
        { type: "response.created", response: response({ usage: null }) },
        { type: "response.completed", response: response() },
      ]),
      120,
    ],
    [
      "a stream in single bytes",
      "/responses",
      { stream: true },
      events(
        [
          { type: "x", delta: "é" },
          { type: "response.completed", response: response() },
        ],
        { size: 1 },
      ),
      120,
    ],
    [
      "a stream with CRLF",
      "/responses",
      { stream: true },
      events([{ type: "response.completed", response: response() }], { newline: "\r\n" }),
      120,
    ],
    [
      "a last event without a blank line",
      "/responses",
      { stream: true },
      (_, res) =>
        res
          .writeHead(200, { "content-type": "text/event-stream" })
          .end(`data: ${JSON.stringify({ response: response() })}`),
      120,
    ],
    [
      "JSON in single bytes",
      "/chat/completions",
      {},
      async (_, res) => {
        res.writeHead(200, { "content-type": "application/json" });
        for (const byte of Buffer.from(JSON.stringify(chat(), null, 2))) res.write(Buffer.of(byte));
        res.end();
      },
      120,
    ],
    [
      "JSON that says in its own way what it is, and how it is not packed",
      "/chat/completions",
      {},
      (_, res) =>
        res
          .writeHead(200, { "content-type": "Application/JSON", "content-encoding": "identity" })
          .end(JSON.stringify(chat({ id: "x".repeat(300) }))),
      120,
    ],
    ["an answer of yesterday", "/responses/x", {}, json(response({ created_at: seconds() - 86_400 })), 0],
    ["an answer with another status", "/chat/completions", {}, json(chat(), 400), 0],
    [
      "embeddings",
      "/embeddings",
      {},
      json({ object: "list", model: "m", data: [], usage: { prompt_tokens: 8, total_tokens: 8 } }),
      0,
    ],
    [
      "plain text that looks like usage",
      "/files/x",
      {},
      (_, res) => res.writeHead(200, { "content-type": "text/plain" }).end(JSON.stringify(chat())),
      0,
    ],
  ];
  test("counts what answers tell, and passes their bytes on unaltered", async () => {
    let reply: Reply = json({});
    let sent = Buffer.alloc(0);
    using openai = await startOpenAi((call, response) => {
      // What goes over the wire, as the client would get it straight.
      const keep = (chunk: unknown) => void (sent = Buffer.concat([sent, Buffer.from(String(chunk ?? ""), "latin1")]));
      const spy = new Proxy(response, {
        get(target, name) {
          const value: unknown = Reflect.get(target, name);
          if (typeof value !== "function") return value;
          return (...args: unknown[]) => {
            const [chunk] = args;
            if (name === "write" || name === "end")
              keep(
                Buffer.isBuffer(chunk)
                  ? chunk.toString("latin1")
                  : chunk === undefined
                    ? ""
                    : Buffer.from(String(chunk)).toString("latin1"),
              );
            const result: unknown = Reflect.apply(value, target, args);
            return result === target ? spy : result;
          };
        },
      });
      reply(call, spy);
    });
    await using breaker = await serveGateway(openai);
    let total = 0;
    for (const [name, path, body, answer, tokens] of counted) {
      reply = answer;
      sent = Buffer.alloc(0);
      const got = Buffer.from(await (await breaker.post(path, body)).arrayBuffer());
      expect([name, got.toString()]).toEqual([name, sent.toString()]);
      total += tokens;
      expect([name, await breaker.used()]).toEqual([name, total]);
    }
  });

  test("asks for the usage of a chat stream that does not, and takes out the one event that this adds", async () => {
    using openai = await startOpenAi((call, response) =>
      events(chunks({ isAsked: call.body.includes("include_usage") }), { size: 7 })(call, response),
    );
    await using breaker = await serveGateway(openai);
    const asked = { model: MODEL, stream: true, messages: [{ role: "user", content: "é" }] };
    const text = await (await breaker.post("/chat/completions", asked)).text();
    expect(openai.calls[0]?.body).toStartWith('{"stream_options":{"include_usage":true},"model"');
    expect(openai.calls[0]?.headers["content-length"]).toBe(String(openai.calls[0]?.body.length));
    expect(text).toContain("lo é😀");
    expect(text).toEndWith("data: [DONE]\n\n");
    expect(text.match(/^data: /gm)).toHaveLength(4);
    expect(text).not.toContain("prompt_tokens");
    expect(await breaker.used()).toBe(120);
  });

  test("the last event of a stream that was asked for its usage is shown, also without a blank line", async () => {
    using openai = await startOpenAi((_, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" }).end('data: {"a":1}\n\ndata: [DONE]');
    });
    await using breaker = await serveGateway(openai);
    const answer = await breaker.post("/chat/completions", { stream: true });
    expect(await answer.text()).toBe('data: {"a":1}\n\ndata: [DONE]');
  });

  test("of the event that is taken out, no blank line before it is", async () => {
    const [before, added] = ['data: {"a":1}\n\n\n', formatEvents(chunks({ isAsked: true }).slice(-2, -1))];
    using openai = await startOpenAi((_, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" }).end(`${before}${added}data: [DONE]\n\n`);
    });
    await using breaker = await serveGateway(openai);
    const answer = await breaker.post("/chat/completions", { stream: true });
    expect(await answer.text()).toBe(`${before}data: [DONE]\n\n`);
  });

  test("an answer that tells its length tells none where the event is taken out", async () => {
    const bytes = Buffer.from(formatEvents(chunks({ isAsked: true })));
    using openai = await startOpenAi((_, response) => {
      response.writeHead(200, { "content-type": "text/event-stream", "content-length": bytes.length }).end(bytes);
    });
    await using breaker = await serveGateway(openai);
    const answer = await breaker.post("/chat/completions", { stream: true });
    expect(answer.headers.get("content-length")).toBeNull();
    expect(await answer.text()).toEndWith("data: [DONE]\n\n");
  });

  test("a short answer keeps its Content-Length", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    expect((await breaker.post("/responses", {})).headers.get("content-length")).toBe("2");
  });

  test("a chat request that is long, or does not say how long it is, passes unread", async () => {
    using openai = await startOpenAi((call, response) => json({ length: call.body.length })(call, response));
    await using breaker = await serveGateway(openai);
    const long = `{"stream":true,"x":"${"x".repeat(9 * 2 ** 20)}"}`;
    expect(await (await breaker.post("/chat/completions", long)).json()).toEqual({ length: long.length });
    const head = ["POST /v1/chat/completions HTTP/1.1", `Host: ${new URL(breaker.gateway).host}`, "Connection: close"];
    const chunked = [...head, "Content-Type: application/json", "Transfer-Encoding: chunked"];
    await talkHttp(breaker.gateway, chunked, 'f\r\n{"stream":true}\r\n0\r\n\r\n');
    expect(openai.calls[1]?.body).toBe('{"stream":true}');
  });

  test.each([
    "http:/HOST/v1/x",
    "http:HOST/v1/x",
    "http:\\\\HOST\\v1\\x",
    "https:/HOST/v1/x",
    "file:///v1/x",
    "HOST/v1/x",
  ])("CONNECT %s leads nowhere else", async (target) => {
    let hits = 0;
    using other = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response(`${hits++}`) });
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    const line = `CONNECT ${target.replace("HOST", `127.0.0.1:${other.port}`)} HTTP/1.1`;
    const head = [line, `Host: ${new URL(breaker.gateway).host}`, "Connection: close"];
    expect(await talkHttp(breaker.gateway, head)).toMatch(/^HTTP\/1.1 40[04] /);
    expect([hits, openai.calls.length]).toEqual([0, 0]);
  });

  test("a long request waits where very much is held of others; a short one, and what answers tell, does not", async () => {
    using openai = await startOpenAi((call, response) =>
      events(chunks({ isAsked: call.body.includes("include_usage") }))(call, response),
    );
    await using breaker = await serveGateway(openai);
    const { host, port } = new URL(breaker.gateway);
    const stalled: ReturnType<typeof connect>[] = [];
    for (let left = 2 ** 26; left > 200_000; left -= Math.min(Math.floor(left / 4), 2 ** 23)) {
      const socket = connect({ port: Number(port), host: "127.0.0.1" }).on("error", () => {});
      const size = Math.min(Math.floor(left / 4), 2 ** 23);
      socket.write(`POST /v1/chat/completions HTTP/1.1\r\nHost: ${host}\r\nContent-Length: ${size}\r\n\r\n`);
      stalled.push(socket);
      await talkHttp(breaker.gateway, ["GET / HTTP/1.1", `Host: ${host}`, "Connection: close"]); // Answered after that.
    }
    const send = async (more: object) =>
      await (await breaker.post("/chat/completions", { stream: true, ...more })).text();
    await send({});
    const long = send({ long: "x".repeat(100_000) });
    await send({});
    expect([openai.calls.length, await breaker.used()]).toEqual([2, 240]);
    for (const socket of stalled) socket.destroy();
    await long;
    expect([openai.calls.length, await breaker.used()]).toEqual([3, 360]);
  });

  test("what comes behind an event that is too long to be held is counted", async () => {
    const long = { choices: [{ delta: { content: "é".repeat(5 * 2 ** 20) } }] };
    const list = [long, ...chunks({ isAsked: true })];
    using openai = await startOpenAi(events(list));
    await using breaker = await serveGateway(openai);
    const text = await (await breaker.post("/chat/completions", { stream: true })).text();
    const shown = list.filter((event) => !JSON.stringify(event).includes("prompt_tokens"));
    expect(text === formatEvents(shown)).toBe(true); // A difference of 10 MiB is not to be printed.
    expect(await breaker.used()).toBe(120);
  });

  test("with no allowance nothing is touched", async () => {
    using openai = await startOpenAi((call, response) => events(chunks({ isAsked: true }))(call, response));
    await using breaker = await serveGateway(openai, []);
    const text = await (await breaker.post("/chat/completions", { stream: true })).text();
    expect(openai.calls[0]?.body).toBe('{"stream":true}');
    expect(text.match(/"prompt_tokens"/g)).toHaveLength(1);
  });

  test("counts an id once, however often it is polled", async () => {
    const done = response();
    using openai = await startOpenAi(json(done));
    await using breaker = await serveGateway(openai);
    for (let i = 0; i < 3; i++) await (await fetch(`${breaker.gateway}/responses/${done.id}`)).text();
    expect(await breaker.used()).toBe(120);
  });

  test("counts what a stream tells again and again, as it grows, once", async () => {
    const told = [0, 50, 80, 120, 120, 90].map((output_tokens) => ({ input_tokens: 0, output_tokens }));
    using openai = await startOpenAi(events(told.map((usage) => response({ id: "same", usage }))));
    await using breaker = await serveGateway(openai);
    await (await breaker.post("/responses", { stream: true })).text();
    expect(await breaker.used()).toBe(120);
    expect(breaker.logs.at(-1)).toContain("120 tokens");
  });

  test("answers of 10,000 different days cost no long time, and those of days to come count today", async () => {
    const days = Array.from({ length: 10_000 }, (_, i) => response({ created_at: seconds() + (i - 5000) * 86_400 }));
    using openai = await startOpenAi(events(days));
    await using breaker = await serveGateway(openai, ["--allowance", "*=1G"]);
    const before = process.cpuUsage();
    await (await breaker.post("/responses", { stream: true })).text();
    const { user, system } = process.cpuUsage(before);
    expect(await breaker.used()).toBe(120 * 5000); // the latter half
    expect((user + system) / 1000).toBeLessThan(2000); // It takes half a minute where each day is kept.
  });

  test("events that tell nothing cost little", async () => {
    const sent = "a\n\n".repeat(500_000);
    using openai = await startOpenAi((_, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" }).end(sent);
    });
    await using breaker = await serveGateway(openai);
    const before = process.cpuUsage();
    expect(await (await breaker.post("/responses", { stream: true })).text()).toBe(sent);
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000).toBeLessThan(1200); // It takes 3 s where each is parsed.
  });

  /** Has an answer of the gateway sent piece by piece, each once the one before has come through; gives what came. */
  async function sendPieces(pieces: string[], prepare: (gateway: string) => Promise<unknown> = async () => {}) {
    const upstream = Promise.withResolvers<ServerResponse>();
    using openai = await startOpenAi(({ url }, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" });
      const [, size] = /held\/(\d+)/.exec(url) ?? [];
      response.write(size ? ":".repeat(Number(size)) : pieces[0]);
      if (!size) upstream.resolve(response);
    });
    await using breaker = await serveGateway(openai);
    await prepare(breaker.gateway);
    const answer = await breaker.post("/responses", { stream: true });
    const response = await upstream.promise;
    let [text, sent] = ["", 1];
    let expected = pieces[0]?.length ?? 0;
    for await (const chunk of answer.body ?? []) {
      text += Buffer.from(chunk).toString("latin1");
      if (text.length < expected) continue;
      const piece = pieces[sent++];
      if (piece === undefined) response.end();
      else response.write(piece);
      expected += piece?.length ?? 0;
    }
    return { text, used: await breaker.used() };
  }

  test("40 requests of 1 MiB for streams, all at once, are all asked for their usage", async () => {
    const held: (() => void)[] = [];
    using openai = await startOpenAi((call, response) => {
      held.push(() => void events(chunks({ isAsked: call.body.includes("include_usage") }))(call, response));
    });
    await using breaker = await serveGateway(openai);
    const long = "x".repeat(2 ** 20);
    const asked = Array.from({ length: 40 }, () => breaker.post("/chat/completions", { stream: true, long }));
    await until(() => held.length === asked.length);
    for (const answer of held) answer();
    for (const answer of await Promise.all(asked)) await answer.text();
    expect(await breaker.used()).toBe(40 * 120);
  });

  test("an event that grows line by line is not read again for each", async () => {
    const pieces = [`data: ${"x".repeat(7_000_000)}\n`, ...Array<string>(500).fill("data: x\n")];
    const before = process.cpuUsage();
    expect((await sendPieces(pieces)).text).toBe(pieces.join(""));
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000).toBeLessThan(2000); // It takes 6 s where it is.
  });

  test.each(["\n", "\r\n"])(
    "events count also where each byte comes by itself, with lines that end in %j",
    async (end) => {
      const event = (id: string) => `data: ${JSON.stringify({ id, model: "m", usage: inputUsage })}${end}${end}`;
      const sent = `${event("a")}${event("b")}: the end`;
      const { text, used } = await sendPieces([...sent]);
      expect(text).toBe(sent);
      expect(used).toBe(240);
    },
  );

  /** Has so many answers wait for the rest of an event that little of what may be held is left: some 250 KiB. */
  async function leaveLittle(gateway: string): Promise<void> {
    for (let left = 2 ** 26; left > 300_000;) {
      const size = Math.min(Math.floor(left / 4), 2 ** 23) - 30_000; // Some is taken for the pieces.
      const answer = await fetch(`${gateway}/held/${size}`);
      let come = 0;
      const reader = answer.body?.getReader();
      while (come < size) come += (await reader?.read())?.value?.length ?? size;
      left -= size;
    }
  }

  const usageEvent = (id: string) => `data: ${JSON.stringify({ id, model: "m", usage: inputUsage })}\n\n`;
  test("pieces of an event are held no longer than the event", async () => {
    const pieces = Array.from(
      { length: 300 },
      (_, i) => /(.{20})([^]*)/.exec(usageEvent(`${i}`))?.slice(1) ?? [],
    ).flat();
    expect((await sendPieces(pieces, leaveLittle)).used).toBe(300 * 120);
  });

  test("an event of more pieces than may be held passes unread", async () => {
    const sent = `: ${"x".repeat(700)}\n${usageEvent("a")}`;
    const { text, used } = await sendPieces([...sent], leaveLittle);
    expect(text).toBe(sent);
    expect(used).toBe(0);
  });

  /** A gateway whose counts go to `count`. */
  async function countBy(openai: { base: string }, count: Watch["count"]) {
    const argv = ["--gateway", "0", "--allowance", "*=1G", "--base-url", openai.base, "--source", "costs"];
    const { world, watch, stop } = prepareWorld(argv);
    const gateway = startGateway(world, { ...watch, count });
    const end = () => [stop.abort(), gateway.stop()];
    return {
      text: () => fetch(`${gateway.url}/responses`, { method: "POST" }).then((response) => response.text()),
      end,
    };
  }

  test("others have their turn while 40,000 events that came at once are counted", async () => {
    const list = Array.from({ length: 40_000 }, (_, i) => ({ id: `${i}`, model: MODEL, usage: inputUsage }));
    using openai = await startOpenAi(events(list));
    let [counted, before, most] = [0, 0, 0];
    const gateway = await countBy(openai, () => void counted++);
    const answer = gateway.text();
    while (counted < list.length) {
      await new Promise(setImmediate);
      most = Math.max(most, counted - before);
      before = counted;
    }
    expect(most).toBeLessThan(list.length / 4);
    expect(await answer).toHaveLength(formatEvents(list).length);
    gateway.end();
  });

  test("others have their turn while 60 events that came at once take 1 ms each to be counted", async () => {
    const list = Array.from({ length: 60 }, (_, i) => ({ id: `${i}`, model: MODEL, usage: inputUsage }));
    using openai = await startOpenAi(events(list));
    let [counted, before, most] = [0, 0, 0];
    const gateway = await countBy(openai, () => {
      counted++;
      Bun.sleepSync(1);
    });
    const answer = gateway.text();
    while (counted < list.length) {
      await new Promise(setImmediate);
      most = Math.max(most, counted - before);
      before = counted;
    }
    expect(most).toBeLessThan(30);
    await answer;
    gateway.end();
  });

  test("of very many ids none is kept for ever: what is told again then counts again", async () => {
    const list = Array.from({ length: 100_001 }, (_, i) => ({ id: `${i % 100_000}`, model: "", usage: inputUsage }));
    using openai = await startOpenAi(events(list));
    let counted = 0;
    const gateway = await countBy(openai, () => void counted++);
    await gateway.text();
    expect(counted).toBe(100_001);
    gateway.end();
  });

  test("an id is forgotten with its day", async () => {
    let nowMs = Date.now();
    const done = chat({ created: undefined });
    using openai = await startOpenAi(json(done));
    await using breaker = await serveGateway(openai, ["--allowance", "*=1M"], () => nowMs);
    const spend = async () => (await breaker.post("/chat/completions", {})).text();
    await spend();
    expect(await breaker.used()).toBe(120);
    nowMs += DAY;
    await spend();
    await spend();
    expect(await breaker.used()).toBe(120);
  });

  test("the larger of OpenAI's figure and the live count holds, and no look lowers it", async () => {
    let figure = 500;
    let looks = 0;
    const look = (path: string) => {
      if (!path.includes("/usage/")) return page([]);
      looks++;
      return usage({ model: MODEL, input: figure, output: 0 });
    };
    using openai = await startOpenAi((call, response) => json(chat())(call, response), look);
    await using breaker = await serveGateway(openai, ["--allowance", "*=1M", "--interval", "20ms"]);
    const spend = async () => (await breaker.post("/chat/completions", {})).text();
    const lookAgain = () => {
      const seen = looks;
      return until(() => looks > seen + 1);
    };
    expect(await breaker.used()).toBe(500);
    await spend();
    expect(await breaker.used()).toBe(500);
    for (let i = 0; i < 4; i++) await spend();
    expect(await breaker.used()).toBe(600);
    await lookAgain();
    expect(await breaker.used()).toBe(600);
    figure = 700;
    await lookAgain();
    expect(await breaker.used()).toBe(700);
    figure = 0;
    await lookAgain();
    expect(await breaker.used()).toBe(600);
  });

  test("trips at once when the limit is reached: the next request is refused, STATUS says TRUE, the hook runs", async () => {
    const file = join(makeFolder(), "tripped");
    using openai = await startOpenAi((call, response) => json(chat())(call, response));
    await using breaker = await serveGateway(openai, ["--allowance", "*=200", "--on-trip", `cat > ${file}`]);
    expect((await breaker.post("/chat/completions", {})).status).toBe(200);
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    await (await breaker.post("/chat/completions", {})).text();
    expect(breaker.logs.some((line) => line.includes("TRUE, 240 of 200 tokens"))).toBe(true); // no tick was needed
    expect(await breaker.ask("STATUS")).toBe("TRUE");
    for (const method of ["GET", "POST", "DELETE", "OPTIONS", "PATCH"]) {
      const refused = await fetch(`${breaker.gateway}/models`, { method });
      expect([refused.status, refused.headers.get("x-should-retry")]).toEqual([403, "false"]);
      const message = `Refused by the circuit breaker on this machine: 240 of 200 tokens of * used on ${today()} (UTC)`;
      expect(await refused.json()).toEqual({
        error: { message, type: "breaker_open", param: null, code: "breaker_open" },
      });
    }
    expect(openai.calls).toHaveLength(2);
    const info = await until(() => (existsSync(file) ? readFileSync(file, "utf8") : null));
    expect(JSON.parse(info)).toMatchObject({ reason: "allowance" });
  });

  test("a chat request whose body is still coming at a trip is refused", async () => {
    using openai = await startOpenAi((call, response) => json(chat())(call, response));
    await using breaker = await serveGateway(openai, ["--allowance", "*=100"]);
    const { host, port } = new URL(breaker.gateway);
    const socket = connect({ port: Number(port), host: "127.0.0.1" });
    const answered = new Promise<string>((resolve) => socket.once("data", (chunk) => resolve(String(chunk))));
    socket.write(`POST /v1/chat/completions HTTP/1.1\r\nHost: ${host}\r\nContent-Length: 15\r\n\r\n{"stream"`);
    // An answer on a connection that came later: the request above is being read by then.
    expect((await breaker.post("/chat/completions", {})).status).toBe(200);
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    socket.write(":true}");
    expect(await answered).toStartWith("HTTP/1.1 403");
    socket.destroy();
    expect(openai.calls).toHaveLength(1);
  });

  test("of 300 requests at once none starts upstream after a trip, and looks go on", async () => {
    let [looks, cost] = [0, 0];
    const held: ServerResponse[] = [];
    const look = () => page((looks++, [bucket(0, cost)]));
    using openai = await startOpenAi((_, response) => void held.push(response), look);
    const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0"];
    await using breaker = await spawnBreaker([...argv, "--interval", "20ms"], withKey);
    const gateway = (await breaker.info()).gateway ?? "";
    const head = ["POST /v1/responses HTTP/1.1", `Host: ${new URL(gateway).host}`, "Connection: close"];
    // Sockets, since the fetch of this process would hold some of them back itself.
    const asked = Array.from({ length: 300 }, () => talkHttp(gateway, [...head, "Content-Length: 2"], "{}"));
    await until(() => held.length === 200);
    const seen = looks;
    await until(() => looks > seen + 4);
    cost = 1;
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    // Who waits is refused at once, not when others have ended.
    const refused = asked.map((one) => one.then((text) => (text.startsWith("HTTP/1.1 403") ? 1 : 0)));
    let count = 0;
    for (const one of refused) void one.then((isRefused) => (count += isRefused));
    await until(() => count === 100);
    for (const one of held) one.end();
    await Promise.all(refused);
    expect([openai.calls.length, count]).toEqual([200, 100]);
  });

  test("an open breaker waits for no body, and 200 bodies that never come hold nobody up", async () => {
    using openai = await startOpenAi((call, response) => json(chat())(call, response));
    await using breaker = await serveGateway(openai, ["--allowance", "*=200"]);
    const { host, port } = new URL(breaker.gateway);
    const begin = () => {
      const socket = connect({ port: Number(port), host: "127.0.0.1" });
      socket
        .on("error", () => {})
        .write(`POST /v1/chat/completions HTTP/1.1\r\nHost: ${host}\r\nContent-Length: 9\r\n\r\n`);
      return socket;
    };
    const stalled = Array.from({ length: 250 }, begin);
    expect((await breaker.post("/chat/completions", {})).status).toBe(200);
    expect(await (await breaker.post("/chat/completions", {})).text()).toContain("usage");
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    const last = begin();
    const refusal = await new Promise<string>((resolve) => last.once("data", (chunk) => resolve(String(chunk))));
    expect(refusal).toStartWith("HTTP/1.1 403");
    for (const socket of [...stalled, last]) socket.destroy();
    expect(openai.calls).toHaveLength(2);
  });

  test.each([
    ["60", 4],
    ["20", 1],
    ["6_0", 1],
  ])("keeps below a limit of Bun's that the user has lowered to %s", async (limit, room) => {
    const held: ServerResponse[] = [];
    using openai = await startOpenAi((_, response) => void held.push(response));
    const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0", "--allowance", "*=100"];
    const env = { ...withKey.env, BUN_CONFIG_MAX_HTTP_REQUESTS: limit };
    await using breaker = await spawnBreaker(argv, { env });
    const gateway = (await breaker.info()).gateway ?? "";
    const head = ["GET /v1/models HTTP/1.1", `Host: ${new URL(gateway).host}`, "Connection: close"];
    const asked = Array.from({ length: 70 }, () => talkHttp(gateway, head));
    await until(() => held.length === room);
    held.shift()?.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(response()));
    await until(async () => (await breaker.ask("STATUS")) === "TRUE");
    for (const one of held) one.end();
    await Promise.all(asked);
    expect(openai.calls).toHaveLength(room);
  });

  test("refuses while the state is unknown, unless the user wants it otherwise", async () => {
    using openai = await startOpenAi(json(chat()), () => ({ error: "x" }));
    await using unknown = await serveGateway(openai);
    expect(await (await unknown.post("/chat/completions", {})).json()).toMatchObject({
      error: { code: "breaker_open" },
    });
    expect(openai.calls).toHaveLength(0);
    await using lenient = await serveGateway(openai, ["--when-unknown", "false"]);
    expect((await lenient.post("/chat/completions", {})).status).toBe(200);
  });

  test("a request waits for the first look", async () => {
    using account = startHeldAccount();
    const breaker = serve(["--base-url", account.base, "--source", "costs", "--gateway", "0"]);
    await using started = await breaker;
    const url = await until(() => /the gateway is (\S+)/.exec(started.logs.join("\n"))?.[1]);
    const asked = fetch(`${url}/organization/costs`);
    await until(() => account.requests.length === 1);
    account.release();
    // The second request that reaches the account is the one that waited.
    await until(() => account.requests.length === 2);
    account.release();
    expect((await asked).status).toBe(200);
  });

  test.each(["before the head", "in a plain body", "in a stream"])(
    "a client that leaves %s is gone upstream",
    async (phase) => {
      const arrived = Promise.withResolvers<void>();
      using openai = await startOpenAi((_, response) => {
        const type = phase === "in a stream" ? "text/event-stream" : "application/json";
        if (phase !== "before the head") response.writeHead(200, { "content-type": type }).write("data: 1\n\n");
        arrived.resolve();
      });
      await using breaker = await serveGateway(openai);
      const leaving = new AbortController();
      const asked = breaker.post("/chat/completions", { stream: true }, { signal: leaving.signal });
      await arrived.promise;
      if (phase !== "before the head") await (await asked).body?.getReader().read();
      const leftMs = performance.now();
      leaving.abort();
      await asked.catch(() => {});
      const goneMs = await until(() => openai.calls[0]?.goneMs);
      expect(goneMs - leftMs).toBeLessThan(1000);
    },
  );

  test("an answer that is cut reaches the client as a cut, and its tokens as unknown", async () => {
    let cut = () => {};
    using openai = await startOpenAi((_, response) => {
      const [first = ""] = chunks({ isAsked: false });
      cut = () => response.destroy();
      response.writeHead(200, { "content-type": "text/event-stream" }).write(formatEvents([first]));
    });
    await using breaker = await serveGateway(openai);
    const reader = (await breaker.post("/chat/completions", { stream: true })).body?.getReader();
    expect(String(Buffer.from((await reader?.read())?.value ?? []))).toContain("Hel");
    cut();
    expect(
      await reader?.read().then(
        () => "whole",
        () => "cut",
      ),
    ).toBe("cut");
    const line = await until(() => breaker.logs.find((text) => text.includes("/chat/completions")));
    expect(line).toContain(`POST /v1/chat/completions 200 ${MODEL} tokens unknown`);
    expect(await breaker.used()).toBe(0);
  });

  test.each(["a client that leaves", "an upstream that dies"])("%s once all has come is counted", async (who) => {
    let die = () => {};
    using openai = await startOpenAi((_, response) => {
      die = () => response.destroy();
      response.writeHead(200, { "content-type": "application/json" }).write(JSON.stringify(chat())); // It has no end.
    });
    await using breaker = await serveGateway(openai);
    const leaving = new AbortController();
    const answer = await breaker.post("/chat/completions", {}, { signal: leaving.signal });
    await answer.body?.getReader().read();
    if (who === "a client that leaves") leaving.abort();
    else die();
    const line = await until(() => breaker.logs.find((text) => text.includes("/chat/completions")));
    expect(line).toContain(`POST /v1/chat/completions 200 ${MODEL} 120 tokens`);
    expect(await breaker.used()).toBe(120);
  });

  test.each([
    ["authorization", "Bearer 0123456789abcdef", "0123456789abcdef"],
    ["authorization", "Bearer sk-clientsk-client", "sk-client\u200bsk-client"],
    ["authorization", "0123456789abcdef", "0123456789abcdef"],
    ["authorization", "Bearer\t0123456789abcdef", "0123456789abcdef"],
    ["authorization", 'Token token="0123456789abcdef", x', "0123456789abcdef"],
    ["cookie", "a=b; key=0123456789abcdef", "0123456789abcdef"],
    ["x-goog-api-key", "0123456789abcdef", "0123456789abcdef"],
    ["api-key", "0123456789abcdef", "0123456789abcdef"],
    ["x-api-key", "0123456789abcdef", "0123456789abcdef"],
  ])("an upstream that echoes the %s %j as %j puts it in no log", async (name, value, key) => {
    using openai = await startOpenAi(json(chat({ model: key })));
    await using breaker = await serveGateway(openai);
    await (await breaker.post(`/files/${key.slice(0, 16)}`, {}, { headers: { [name]: value } })).text();
    const line = await until(() => breaker.logs.find((text) => text.includes("POST")));
    expect(line).toMatch(/POST \/v1\/files\/sk-\*\*\* /);
    expect(line).not.toMatch(/89abcdef|client/);
  });

  test("an upstream that echoes the breaker's own key puts it in no log, whatever it begins with", async () => {
    const key = "relay-0123456789";
    using openai = await startOpenAi(json(chat({ model: "relay-\u200b0123456789" })));
    const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0"];
    await using breaker = await serve(argv, { env: { OPENAI_ADMIN_KEY: key } });
    const { gateway } = await breaker.info();
    await (await fetch(`${gateway}/responses`, { method: "POST", body: "{}" })).text();
    const line = await until(() => breaker.logs.find((text) => text.includes("POST")));
    expect(line).toContain("POST /v1/responses 200 sk-*** 120 tokens");
  });

  test("an upstream that echoes the breaker's own key puts it in no log before it is read, or after another", async () => {
    const file = join(makeFolder(), "key");
    using openai = await startOpenAi(json(chat({ model: "relay-0123456789" })));
    const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0"];
    const pass = makePass(`until [ -e ${file} ]; do sleep 0.05; done; cat ${file}`);
    await using breaker = await serve(argv, { env: { OPENAI_ADMIN_KEY: "", ...pass } });
    const gateway = await until(() => /the gateway is (\S+)/.exec(breaker.logs.join("\n"))?.[1]);
    const ask = async (path: string) => (await fetch(`${gateway}${path}`, { method: "POST", body: "{}" })).text();
    const early = ask("/early");
    await until(async () => (await fetch(`${gateway}/`, { headers: { host: "x" } })).status === 403); // It has come.
    writeFileSync(`${file}.part`, "relay-0123456789");
    renameSync(`${file}.part`, file);
    await early;
    writeFileSync(file, "relay-9876543210");
    process.emit("SIGHUP", "SIGHUP");
    await until(() => openai.keys.has("Bearer relay-9876543210"));
    await ask("/late");
    const lines = await until(() => {
      const found = breaker.logs.filter((text) => text.includes("POST"));
      return found.length === 2 ? found.join("\n") : null;
    });
    expect(lines).toMatch(/early 200 sk-\*\*\* 120 [^]*late 200 sk-\*\*\* 120 /);
  });

  test("an upstream that cannot be reached is 502, which clients may try again", async () => {
    let openai: Awaited<ReturnType<typeof startOpenAi>> | null = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    openai[Symbol.dispose]();
    openai = null;
    const answer = await breaker.post("/chat/completions", {});
    expect([answer.status, answer.headers.get("x-should-retry")]).toEqual([502, null]);
    expect(await answer.json()).toMatchObject({ error: { code: "upstream_failed" } });
  });

  test("writes a line a request, without its query, its body or a key", async () => {
    using openai = await startOpenAi(json(chat()));
    await using breaker = await serveGateway(openai);
    await (await breaker.post("/chat/completions?secret=1", { prompt: "sk-body" })).text();
    const line = await until(() => breaker.logs.find((text) => text.includes("POST")));
    expect(line).toMatch(/^\S+Z POST \/v1\/chat\/completions 200 gpt-4o-mini-2024-07-18 120 tokens \d+\.\d\d s$/);
  });

  test("screens by the Host that was sent, also one that makes the URL none", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    for (const host of ["evil.example", "127.0.0.1@evil.example", "127.0.0.1:1", "a b"]) {
      const text = await talkHttp(breaker.gateway, ["GET /v1/models HTTP/1.1", `Host: ${host}`, "Connection: close"]);
      expect(text).toMatch(/^HTTP\/1.1 40[03]/);
    }
    expect(openai.calls).toHaveLength(0);
  });

  needsLinux()("listens at 127.0.0.1 and nowhere else (Linux)", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai, ["--host", "0.0.0.0"]);
    const { port } = new URL(breaker.gateway);
    const socket = connect({ port: Number(port), host: "127.0.0.2" });
    const code = await new Promise((resolve) => socket.on("error", resolve).on("connect", () => resolve("connected")));
    socket.destroy();
    expect(code).toMatchObject({ code: "ECONNREFUSED" });
  });

  test("a port in use exits with 69 and names --gateway", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    const { port } = new URL(breaker.gateway);
    const argv = ["serve", "--host", "127.0.0.1", "--port", "0", "--base-url", openai.base, "--source", "costs"];
    const { code, err } = await run([...argv, "--gateway", port]);
    expect([code, err]).toEqual([69, expect.stringContaining(`Cannot listen at 127.0.0.1:${port}`)]);
    expect(err).toContain("take another --gateway");
  });

  test("SIGTERM ends it within 2 s with a stream running", async () => {
    using openai = await startOpenAi((_, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" }).write("data: 1\n\n");
    });
    const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0"];
    await using breaker = await spawnBreaker(argv, withKey);
    const { gateway } = await breaker.info();
    const reader = (await fetch(`${gateway}/responses`, { method: "POST" })).body?.getReader();
    await reader?.read();
    const startMs = performance.now();
    breaker.child.kill("SIGTERM");
    expect(await breaker.child.exited).toBe(0);
    expect(performance.now() - startMs).toBeLessThan(2000);
  });

  test("exec hands it to its command, unless another base URL is set, which it says", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    const argv = ["--port", String(breaker.port), "--", "sh", "-c", "echo $OPENAI_BASE_URL"];
    const handed = spawnExec(argv);
    expect(await new Response(handed.stdout).text()).toBe(`${breaker.gateway}\n`);
    const own = spawnExec(argv, { OPENAI_BASE_URL: "http://127.0.0.1:1/v1" });
    expect(await new Response(own.stdout).text()).toBe("http://127.0.0.1:1/v1\n");
    expect(await new Response(own.stderr).text()).toContain(`the gateway at ${breaker.gateway} is not used`);
    const same = spawnExec(argv, { OPENAI_BASE_URL: breaker.gateway });
    expect(await new Response(same.stderr).text()).toBe("");
  });

  test("exec hands its command no gateway on another machine, whatever INFO says", async () => {
    using openai = await startOpenAi(json({}));
    await using breaker = await serveGateway(openai);
    const info = await breaker.info();
    const lies = JSON.stringify({ ...info, gateway: "http://evil.example/v1" });
    using liar = startLiar((question) => (question.startsWith("STATUS") ? "FALSE\n" : `${lies}\n`));
    const child = spawnExec(["--port", liar.port, "--", "sh", "-c", "echo $OPENAI_BASE_URL"]);
    expect(await new Response(child.stdout).text()).toBe("\n");
  });

  test.each(["", "ERR Busy\n"])("exec does not go past a gateway that it is not told of, by %j", async (info) => {
    using busy = startLiar((question) => (question.startsWith("STATUS") ? "FALSE\n" : info));
    const child = spawnExec(["--port", busy.port, "--", "echo", "ran"]);
    expect([await new Response(child.stdout).text(), await child.exited]).toEqual(["", 69]);
  });

  test("exec starts nothing when the breaker opens between its two questions", async () => {
    let asked = 0;
    using breaker = startLiar(() => (asked++ === 0 ? "FALSE\n" : "TRUE\n"));
    const child = spawnExec(["--port", breaker.port, "--", "echo", "ran"]);
    expect([await new Response(child.stdout).text(), await child.exited]).toEqual(["", 75]);
  });

  test("the drill shows a program being cut off before any cost", async () => {
    const argv = ["--drill", "--gateway", "0", "--allowance", "drill=1k"];
    await using breaker = await serve(argv);
    const { gateway } = await breaker.info();
    const bodies = ["{}", '{"stream":true}', '{"stream":true,"stream_options":{"include_usage":true}}'];
    const statuses: number[] = [];
    for (let i = 0; i < 12; i++) {
      const path = i % 2 === 0 ? "chat/completions" : "responses";
      const answer = await fetch(`${gateway}/${path}`, { method: "POST", body: bodies[i % 3] ?? "{}" });
      statuses.push(answer.status);
      expect(await answer.text()).toContain(answer.ok ? "This is a drill." : "1080 of 1000 tokens of drill");
    }
    expect(statuses).toEqual([...Array(9).fill(200), 403, 403, 403]);
    expect(await breaker.info()).toMatchObject({
      open: true,
      reason: "allowance",
      cost: { total: 0 },
      source: "drill",
    });
  });
});

// ── The README ──────────────────────────────────────────────────────────────────────────────────

suite("the README", () => {
  const readme = join(import.meta.dir, "README.md");

  needs("nc", "timeout")(
    "shows a gate for agents: exit 2 with a reason when open or unknown, silence when closed (nc)",
    async () => {
      const script = /```sh\n(#!\/bin\/sh\n[^`]*nc -N[^`]*)```/.exec(readFileSync(readme, "utf8"))?.[1] ?? "";
      expect(script).toContain("5555");
      let answer = FREE;
      using account = startAccount(() => answer);
      await using breaker = await serve(["--base-url", account.base, "--source", "costs", "--interval", "20ms"]);
      const gate = join(makeFolder(), "gate.sh");
      writeFileSync(gate, script.replaceAll("5555", String(breaker.port)));
      chmodSync(gate, 0o755);
      expect(await sh(gate)).toEqual({ code: 0, out: "", err: "" });
      answer = CENT;
      await until(async () => (await breaker.ask("STATUS")) === "TRUE");
      expect(await sh(gate)).toEqual({ code: 2, out: "", err: expect.stringMatching(/\w/) });
      writeFileSync(gate, script.replaceAll("5555", await findFreePort()));
      expect(await sh(gate)).toEqual({ code: 2, out: "", err: expect.stringMatching(/\w/) });
    },
  );

  test("with zod beside a copy, no .npmrc of the folder where it starts says where to fetch one", async () => {
    const [, version = ""] = /from "zod@(.*)"/.exec(readFileSync(SCRIPT, "utf8")) ?? [];
    expect(readFileSync(readme, "utf8")).toContain(`run \`bun add zod@${version}\` beside the copy`);
    const [own, others, home] = [makeFolder(), makeFolder(), makeFolder()];
    let hits = 0;
    using registry = Bun.serve({
      hostname: "127.0.0.1",
      port: 0,
      fetch: () => new Response((hits++, ""), { status: 404 }),
    });
    writeFileSync(join(others, ".npmrc"), `registry=http://127.0.0.1:${registry.port}/\n`);
    cpSync(SCRIPT, join(own, "breaker.ts"));
    const start = `cd ${others} && "${process.execPath}" -i --no-env-file ${join(own, "breaker.ts")} --version`;
    expect((await sh(start, { HOME: home })).code).not.toBe(0);
    expect(hits).toBeGreaterThan(0);
    const seen = hits;
    cpSync(join(SCRIPT, "../node_modules/zod"), join(own, "node_modules/zod"), { recursive: true, dereference: true });
    expect((await sh(start, { HOME: home })).out).toBe(`${VERSION}\n`);
    expect(hits).toBe(seen);
  });

  test("the first line of the file and those for agents take nothing from the folder where they start", async () => {
    const [line = ""] = readFileSync(SCRIPT, "utf8").split("\n", 1);
    const [, flags = ""] = /^#!\/usr\/bin\/env -S bun (.*)$/.exec(line) ?? [];
    const text = readFileSync(readme, "utf8");
    expect(text).toContain(`ExecCondition=/path/to/bun ${flags} /path/to/breaker.ts status`);
    expect(text).toContain(`claude mcp add breaker -- bun ${flags} /path/to/breaker.ts mcp`);
    const [, args = ""] = /"args":(\[[^\]]*\])/.exec(text) ?? [];
    expect(JSON.parse(args)).toEqual([...flags.split(" "), "/path/to/breaker.ts", "mcp"]);

    const [own, others] = [makeFolder(), makeFolder()];
    const script = join(own, "breaker.ts");
    symlinkSync(process.execPath, join(own, "bun"));
    writeFileSync(
      script,
      `${line}\nimport { basename } from "node:path"; console.log(basename("a/own"), process.env.ENTRY);`,
    );
    chmodSync(script, 0o755);
    writeFileSync(join(others, "other.ts"), 'console.log("other"); process.exit();');
    writeFileSync(join(others, ".env"), "ENTRY=other");
    writeFileSync(join(others, "tsconfig.json"), '{"compilerOptions":{"paths":{"*":["./other.ts"]}}}');
    const start = (command: string) => sh(`cd ${others} && ${command}`, { PATH: `${own}:${process.env["PATH"]}` });
    expect((await start(`bun ${script}`)).out).toBe("other\n");
    expect(await start(script)).toEqual({ code: 0, out: "own undefined\n", err: "" });
    writeFileSync(join(others, "bunfig.toml"), `preload = ["./other.ts"]`);
    expect(await start(script)).toEqual({ code: 0, out: "own undefined\n", err: "" });
  });

  test("names every option, and nothing that is none", () => {
    // Those of bun and of systemctl.
    const others = ["--config", "--kill-whom", "--no-env-file", "--tsconfig-override", "--user"];
    const list = (text: string) => [...new Set(text.match(/(?<![-\w])--[a-z][-a-z]*/g))].sort();
    const named = list(readFileSync(readme, "utf8"));
    expect(named.filter((name) => !others.includes(name))).toEqual(list(formatHelp()));
  });

  test("asks 127.0.0.1, and localhost only by hand: another user may listen on ::1", () => {
    const asked = readFileSync(readme, "utf8").match(/.*\bnc [^\n]*5555.*/g) ?? [];
    expect(asked.length).toBeGreaterThan(4);
    const byHand = /^`?echo (STATUS|INFO) \| nc localhost 5555/;
    for (const line of asked.filter((text) => !byHand.test(text))) expect(line).toMatch(/nc [^|]*127\.0\.0\.1 5555/);
  });
});

// ── Turns ───────────────────────────────────────────────────────────────────────────────────────

suite("turns", () => {
  /** Has 250 clients send what waits for a turn, and leave; gives after how many rounds a last one is answered. */
  async function countRounds(port: number, bytes: string): Promise<number> {
    const leave = async () => {
      const socket = connect({ port, host: "127.0.0.1" }).on("error", () => {});
      await new Promise<void>((resolve) => socket.on("connect", () => socket.write(bytes, () => resolve())));
      socket.resetAndDestroy();
    };
    await Promise.all(Array.from({ length: 250 }, leave));
    const last = connect({ port, host: "127.0.0.1" });
    let [rounds, isAnswered] = [0, false];
    last.on("data", () => (isAnswered = true)).write(bytes);
    for (; !isAnswered; rounds++) await new Promise(setImmediate);
    last.destroy();
    return rounds;
  }

  /** Answers the gateway's requests at once: Bun sends them in a thread of its own, which takes any number of rounds. */
  function answerFetch(answer: (init?: RequestInit) => Response) {
    const reply = async (_: unknown, init?: RequestInit) => answer(init);
    return spyOn(globalThis, "fetch").mockImplementation(Object.assign(reply, { preconnect: fetch.preconnect }));
  }

  test("nobody waits for his turn behind agents that have left", async () => {
    const { world, watch, stop } = prepareWorld(["--host", "127.0.0.1", "--port", "0"]);
    const server = startServer(world, watch);
    const line = `${request(1, "ping", { x: "x".repeat(60_000) })}\n`;
    expect(await countRounds(server.port, line.repeat(2))).toBeLessThan(200);
    stop.abort();
    await server.stop();
  });

  test("nobody waits for his turn behind programs that have left the gateway", async () => {
    using _fetch = answerFetch(() => new Response("{}"));
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs", "--allowance", "*=1G"]);
    const gateway = startGateway(world, watch);
    const { port, host } = new URL(gateway.url);
    const body = JSON.stringify({ stream: true });
    const bytes = `POST /v1/chat/completions HTTP/1.1\r\nHost: ${host}\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
    expect(await countRounds(Number(port), bytes)).toBeLessThan(200);
    stop.abort();
    await gateway.stop();
  });

  test.each([
    ["a long piece", `data: ${"x".repeat(20_000)}`, "text/event-stream"],
    ["300 events that tell nothing", "data: 1\n\n".repeat(300), "text/event-stream"],
    ["a long piece that nobody reads", "x".repeat(20_000), "application/octet-stream"],
  ])("streams that send %s at once are passed on in turns", async (_, piece, type) => {
    const released = Promise.withResolvers<void>();
    let [waiting, read] = [0, 0];
    async function* body() {
      waiting++;
      await released.promise;
      yield Buffer.from(piece);
    }
    const headers = { "content-type": type };
    using _fetch = answerFetch(() => new Response(body(), { headers }));
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs", "--allowance", "*=1G"]);
    const gateway = startGateway({ ...world, log: () => void read++ }, watch); // A line is logged at the end of each.
    const host = `Host: ${new URL(gateway.url).host}`;
    const answers = Array.from({ length: 50 }, () =>
      talkHttp(gateway.url, ["GET /v1/responses HTTP/1.1", host, "Connection: close"]),
    );
    await until(() => waiting === 50);
    let ms = performance.now();
    const now = spyOn(performance, "now").mockImplementation(() => (ms += 2)); // Five of these fill a round.
    released.resolve();
    let [before, most] = [0, 0];
    while (read < 50) {
      await new Promise(setImmediate);
      [most, before] = [Math.max(most, read - before), read];
    }
    now.mockRestore();
    expect(most).toBeLessThan(10);
    await Promise.all(answers);
    await until(() => performance.now() > ms); // By it, a round of turns may still go on.
    stop.abort();
    await gateway.stop();
  });

  test("requests that come at once, and take 1 ms each, are answered in turns", async () => {
    let [answered, before, most] = [0, 0, 0];
    const log = () => {
      answered++;
      Bun.sleepSync(1);
    };
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs"]);
    const gateway = startGateway({ ...world, log }, watch);
    const { port, hostname, host } = new URL(gateway.url);
    const sockets = await Promise.all(
      Array.from({ length: 100 }, async () => {
        const socket = connect({ port: Number(port), host: hostname }).on("error", () => {});
        await new Promise<void>((resolve) => socket.on("connect", () => resolve()));
        return socket;
      }),
    );
    for (const socket of sockets) socket.write(`GET /none HTTP/1.1\r\nHost: ${host}\r\n\r\n`);
    while (answered < 100) {
      await new Promise(setImmediate);
      [most, before] = [Math.max(most, answered - before), answered];
    }
    expect(most).toBeLessThan(30);
    for (const socket of sockets) socket.destroy();
    stop.abort();
    await gateway.stop();
  });

  type Narrow = { onLine?: () => void; isOpen?: () => boolean };

  /** A gateway with room for one request; those that it sends on hang until they are ended here, or aborted. */
  function startNarrow({ onLine = () => {}, isOpen = () => false, ...given }: Partial<Watch> & Narrow = {}) {
    const sent: { url: string; body: RequestInit["body"]; end: () => void }[] = [];
    const hang = (url: unknown, { signal, body }: RequestInit = {}) => {
      const answer = Promise.withResolvers<Response>();
      const abort = () => answer.reject(signal?.reason);
      signal?.addEventListener("abort", abort);
      if (signal?.aborted) abort();
      else sent.push({ url: String(url), body, end: () => answer.resolve(new Response("{}")) });
      return answer.promise;
    };
    const mocked = Object.assign(hang, { preconnect: fetch.preconnect });
    const restored = spyOn(globalThis, "fetch").mockImplementation(mocked);
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs", "--allowance", "*=1G"]);
    let [lines, begun] = [0, 0];
    const log = () => {
      lines++;
      onLine();
    };
    const env = { BUN_CONFIG_MAX_HTTP_REQUESTS: "57" };
    const describe = () => ({ ...watch.describe(), open: isOpen() });
    const gateway = startGateway({ ...world, env, log }, { ...watch, describe, ...given });
    const { port, hostname, host } = new URL(gateway.url);
    const send = (line: string, rest = "\r\n") => {
      const socket = connect({ port: Number(port), host: hostname }).on("error", () => {});
      socket.write(`${line} HTTP/1.1\r\nHost: ${host}\r\n${rest}`);
      begun++;
      return socket;
    };
    return {
      sent,
      send,
      lines: () => lines,
      /** Once this is answered, all that was sent before has come. */
      settle: () => (begun++, talkHttp(gateway.url, ["GET / HTTP/1.1", `Host: ${host}`, "Connection: close"])),
      async end(sockets: ReturnType<typeof connect>[]) {
        for (const socket of sockets) socket.destroy();
        await until(() => lines === begun);
        restored.mockRestore();
        stop.abort();
        await gateway.stop();
      },
    };
  }

  test("the more requests wait, the seldomer each looks whether it may pass", async () => {
    let asked = 0;
    const never = Promise.withResolvers<void>();
    const { send, end } = startNarrow({ whenSettled: () => (asked++, never.promise) });
    const sockets = Array.from({ length: 800 }, () => send("GET /v1/models"));
    await until(() => asked >= 800);
    const before = asked;
    await Bun.sleep(500); // Not for luck: looks are counted while it passes.
    expect(asked - before).toBeLessThan(4000); // Each 50 ms it would be 8,000.
    await end(sockets);
  });

  test("requests that wait and leave let no other pass", async () => {
    const { sent, send, lines, settle, end } = startNarrow();
    const staying = Array.from({ length: 20 }, () => send("GET /v1/staying"));
    await until(() => sent.length === 1);
    const leaving = Array.from({ length: 20 }, () => send("GET /v1/leaving"));
    await settle();
    for (const socket of leaving) socket.resetAndDestroy();
    await until(() => lines() === 1 + leaving.length);
    expect(sent).toHaveLength(1);
    await end(staying);
  });

  test("who comes when a place is free goes behind those who wait for one", async () => {
    const sockets: ReturnType<typeof connect>[] = [];
    let isWaiting = false;
    const onLine = () => {
      if (isWaiting) sockets.push(send("GET /v1/new"));
      isWaiting = false;
    };
    const { sent, send, settle, end } = startNarrow({ onLine });
    sockets.push(send("GET /v1/first"));
    await until(() => sent.length === 1);
    for (let i = 0; i < 3; i++) sockets.push(send("GET /v1/waiting"));
    await settle();
    isWaiting = true;
    sent[0]?.end();
    await until(() => sent.length === 2);
    expect(sent[1]?.url).toEndWith("/v1/waiting");
    await end(sockets);
  });

  test("a request for a stream that says its length twice is asked for its usage", async () => {
    const { sent, send, end } = startNarrow();
    const body = `{"stream":true}${" ".repeat(2 ** 17)}`;
    const length = `Content-Length: ${body.length}`;
    const asked = send("POST /v1/chat/completions", `${length}\r\n${length}\r\n\r\n${body}`);
    await until(() => sent.length === 1);
    expect(sent[0]?.body).toBeInstanceOf(ReadableStream); // Bun keeps bytes to the end of the answer.
    expect(await new Response(sent[0]?.body).text()).toContain("include_usage");
    await end([asked]);
  });

  test("a request for a stream is asked for its usage also where the breaker closes while it waits", async () => {
    let isOpen = false;
    const { sent, send, settle, end } = startNarrow({ isOpen: () => isOpen });
    const first = send("GET /v1/first");
    await until(() => sent.length === 1);
    isOpen = true;
    const body = '{"stream":true}';
    const second = send("POST /v1/chat/completions", `Content-Length: ${body.length}\r\n\r\n${body}`);
    await settle();
    isOpen = false;
    sent[0]?.end();
    await until(() => sent.length === 2);
    expect(await new Response(sent[1]?.body).text()).toContain("include_usage");
    await end([first, second]);
  });

  test("a request for a stream that was open when its body came is refused, though the breaker closes then", async () => {
    let asked = 0;
    const { sent, send, settle, end } = startNarrow({ isOpen: () => asked++ < 3 });
    await settle();
    asked = 0;
    const body = '{"stream":true}';
    const socket = send("POST /v1/chat/completions", `Content-Length: ${body.length}\r\n\r\n${body}`);
    expect(String(await new Promise((resolve) => socket.once("data", resolve)))).toStartWith("HTTP/1.1 403");
    expect(sent).toHaveLength(0);
    await end([socket]);
  });

  test("a request whose body comes when all has slept waits for a look, as a new one does", async () => {
    const never = Promise.withResolvers<void>();
    let [asked, settled]: [number, Promise<void> | null] = [0, null];
    const { sent, send, settle, end } = startNarrow({ whenSettled: () => (asked++, settled) });
    const body = '{"stream":true}';
    const socket = send("POST /v1/chat/completions", `Content-Length: ${body.length}\r\n\r\n`);
    await settle();
    settled = never.promise;
    const before = asked;
    socket.write(body);
    await until(() => asked > before + 2);
    expect(sent).toHaveLength(0);
    settled = null;
    await until(() => sent.length === 1);
    await end([socket]);
  });

  test("of who has left, a long piece of a stream is not read to its end, and yet counted", async () => {
    const left = Promise.withResolvers<void>();
    let [isLogged, counted] = [false, 0];
    const told = formatEvents([{ id: "far", model: "m", usage: inputUsage }]);
    async function* body() {
      yield Buffer.from(": \n\n".repeat(2_000_000) + told + "data: [DONE]\n\n");
    }
    const headers = { "content-type": "text/event-stream" };
    using _fetch = answerFetch(() => new Response(body(), { headers }));
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs", "--allowance", "*=1G"]);
    const count = ({ amount }: { amount: number }) => void (counted += amount);
    const gateway = startGateway({ ...world, log: () => void (isLogged = true) }, { ...watch, count });
    const { port, hostname, host } = new URL(gateway.url);
    const socket = connect({ port: Number(port), host: hostname }).on("error", () => {});
    socket.on("close", () => left.resolve());
    socket.write(`GET /v1/responses HTTP/1.1\r\nHost: ${host}\r\n\r\n`);
    await until(() => _fetch.mock.calls.length === 1);
    socket.resetAndDestroy();
    await left.promise;
    let rounds = 0;
    for (; !isLogged; rounds++) await new Promise(setImmediate);
    expect({ isQuick: rounds < 30, counted }).toEqual({ isQuick: true, counted: 120 }); // Of all of it, 90 rounds.
    stop.abort();
    await gateway.stop();
  });

  test("a stream that is silent after a long event keeps none of it in memory", async () => {
    const left = Promise.withResolvers<void>();
    async function* body() {
      for (const letter of "ab") yield Buffer.from(`data: ${letter.repeat(2 ** 21)}`);
      yield Buffer.from("\n\ndata: c");
      await left.promise;
    }
    const headers = { "content-type": "text/event-stream" };
    using _fetch = answerFetch(() => new Response(body(), { headers }));
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs"]);
    const gateway = startGateway(world, watch);
    const { port, hostname, host } = new URL(gateway.url);
    const measure = () => {
      Bun.gc(true);
      return heapStats().extraMemorySize;
    };
    const before = measure();
    let received = 0;
    for (let streams = 0; streams < 10; streams++) {
      const socket = connect({ port: Number(port), host: hostname }).on("data", ({ length }) => (received += length));
      socket.write(`GET /v1/responses HTTP/1.1\r\nHost: ${host}\r\n\r\n`);
    }
    await until(() => received > 10 * 2 ** 22);
    await until(() => measure() - before < 2 ** 23); // Of the 40 MiB that came, all were kept.
    left.resolve();
    stop.abort();
    await gateway.stop();
  });

  test("who takes turns without end goes behind all who wait for one", async () => {
    let [counted, isAnswered] = [0, false];
    async function* body() {
      const all = Array.from({ length: 100 }, () => ({ id: crypto.randomUUID(), model: "m", usage: inputUsage }));
      yield Buffer.from(formatEvents(all));
    }
    const headers = { "content-type": "text/event-stream" };
    using _fetch = answerFetch((init) => new Response(init?.body ? "{}" : body(), { headers }));
    const { world, watch, stop } = prepareWorld(["--gateway", "0", "--source", "costs", "--allowance", "*=1G"]);
    const count = () => {
      counted++;
      if (!isAnswered) Bun.sleepSync(6); // Two of these fill a round.
    };
    const gateway = startGateway(world, { ...watch, count });
    const host = `Host: ${new URL(gateway.url).host}`;
    const streams = Array.from({ length: 8 }, () =>
      talkHttp(gateway.url, ["GET /v1/responses HTTP/1.1", host, "Connection: close"]),
    );
    await until(() => counted >= 20);
    const before = counted;
    const asking = '{"stream":true}';
    const head = ["POST /v1/chat/completions HTTP/1.1", host, `Content-Length: ${asking.length}`, "Connection: close"];
    await talkHttp(gateway.url, head, asking);
    isAnswered = true;
    expect(counted - before).toBeLessThan(60);
    await Promise.all(streams);
    stop.abort();
    await gateway.stop();
  });

  test.skipIf(!isLinux)("agents that leave in the midst of a long line are let go (Linux)", async () => {
    using account = startAccount(always(FREE));
    await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
    const line = `${request("x".repeat(60_000), "ping")}\n`;
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    const countFiles = () => readdirSync(`/proc/${breaker.pid}/fd`).length;
    const before = countFiles();
    const agents = Array.from({ length: 2 }, () => connect({ port: breaker.port, host: "127.0.0.1" }));
    for (const agent of agents) {
      agent.write(line.slice(0, 40_000));
      await new Promise((resolve) => agent.once("data", resolve).write(line.slice(40_000)));
      await new Promise<void>((resolve) => agent.write(line.slice(0, 40_000), () => resolve()));
    }
    expect(await breaker.ask("STATUS")).toBe("FALSE");
    for (const agent of agents) agent.destroy();
    await until(() => countFiles() <= before);
  });

  test.each([
    ["300 short lines each", "{}\n".repeat(300), 300],
    ["a long line each", `{"jsonrpc":"2.0","id":${"[".repeat(60_000)}\n`, 1],
  ])("agents that send %s are read in turns", async (_, text, lines) => {
    const { world, watch, stop } = prepareWorld(["--host", "127.0.0.1", "--port", "0"]);
    let [answered, before, most] = [0, 0, 0];
    const describe = () => {
      answered++;
      return watch.describe();
    };
    const server = startServer(world, { ...watch, describe });
    const agents = Array.from({ length: 200 }, () => connect({ port: server.port, host: "127.0.0.1" }));
    for (const agent of agents) agent.on("data", () => {}).write(text);
    while (answered < 200 * lines) {
      await new Promise(setImmediate);
      most = Math.max(most, answered - before);
      before = answered;
    }
    // All of it takes some 200 ms, and a turn takes 10.
    expect(most).toBeLessThan(100 * lines);
    for (const agent of agents) agent.destroy();
    stop.abort();
    await server.stop();
  });
});

// ── What takes its time ─────────────────────────────────────────────────────────────────────────
// These wait for the limits of 10 s; they run at the same time, each with processes of its own.

suite("slowly", () => {
  test.concurrent(
    "400 agents that send 400 KB of short messages each leave the others their turn",
    async () => {
      using account = startAccount(always(FREE));
      await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
      expect(await breaker.ask("STATUS")).toBe("FALSE");
      const flood = Buffer.from(`{"jsonrpc":"2.0","method":"x"}\n${"\n".repeat(400_000)}`);
      const agents = Array.from({ length: 400 }, () => connect({ port: breaker.port, host: "127.0.0.1" }));
      for (const agent of agents) agent.on("error", () => {}).write(flood);
      // It takes 12 s where each is read to its end at once; the bound is wide, since the flood shares the processors.
      const startMs = performance.now();
      for (let i = 0; i < 3; i++) expect(await breaker.ask("STATUS")).toBe("FALSE");
      expect(performance.now() - startMs).toBeLessThan(6000);
      for (const agent of agents) agent.destroy();
    },
    20_000,
  );

  test.concurrent.skipIf(!isLinux)(
    "100 MB up and down through the gateway stay within 64 MiB of idle, an endless event within 128 MiB (Linux)",
    async () => {
      const size = 100_000_000;
      using openai = await startOpenAi((call, response) => {
        const isEvent = call.url.endsWith("/completions");
        if (call.method === "POST" && !isEvent) return void response.end(String(call.body.length));
        const piece = Buffer.alloc(1_000_000, 120);
        let left = size / piece.length;
        const write = () => {
          while (left-- > 0) if (!response.write(piece)) return void response.once("drain", write);
          response.end();
        };
        response.writeHead(200, { "content-type": isEvent ? "text/event-stream" : "application/octet-stream" });
        write();
      });
      const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0", "--allowance", "*=1M"];
      await using breaker = await spawnBreaker(argv, withKey);
      const { gateway } = await breaker.info();
      const read = () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${breaker.pid}/status`, "utf8"))?.[1]);
      await (await fetch(`${gateway}/files`, { method: "POST", body: "warm" })).text();
      const idle = read();
      let peak = idle;
      const watching = setInterval(() => (peak = Math.max(peak, read())), 10);
      const uploaded = await (await fetch(`${gateway}/files`, { method: "POST", body: Buffer.alloc(size) })).text();
      expect(uploaded).toBe(String(size));
      const downloads = [
        { path: "/files/x/content", init: {}, limitMib: 64 },
        { path: "/chat/completions", init: { method: "POST", body: '{"stream":true}' }, limitMib: 128 },
      ];
      for (const { path, init, limitMib } of downloads) {
        let got = 0;
        for await (const chunk of (await fetch(`${gateway}${path}`, init)).body ?? []) {
          if (got === 0) await Bun.sleep(500); // a reader that is slow to begin
          got += chunk.length;
        }
        expect(got).toBe(size);
        expect(peak - idle).toBeLessThan(limitMib * 1024);
      }
      clearInterval(watching);
    },
    30_000,
  );

  test.concurrent(
    "who connects to the gateway and asks nothing is cut off, so that no file descriptors run out",
    async () => {
      using account = startAccount(always(FREE));
      const argv = ["--base-url", account.base, "--source", "costs", "--gateway", "0"];
      await using breaker = await spawnBreaker(argv, withKey);
      const port = Number(new URL((await breaker.info()).gateway ?? "").port);
      const ended = ["", "GET /v1/models HT"].map((text) => {
        const socket = connect({ port, host: "127.0.0.1" }).on("error", () => {});
        if (text) socket.write(text);
        return new Promise((resolve) => socket.on("close", resolve));
      });
      await Promise.all(ended);
    },
    25_000,
  );

  test.concurrent(
    "a stream that is silent for longer than any limit of 10 s is not cut, nor by Bun's own",
    async () => {
      using openai = await startOpenAi((_, response) => {
        response.writeHead(200, { "content-type": "text/event-stream" }).write("data: 1\n\n");
        setTimeout(() => response.end("data: 2\n\n"), 12_000);
      });
      const argv = ["--base-url", openai.base, "--source", "costs", "--gateway", "0"];
      const env = { ...withKey.env, BUN_CONFIG_HTTP_IDLE_TIMEOUT: "1" }; // It is six minutes.
      await using breaker = await spawnBreaker(argv, { env });
      const { gateway } = await breaker.info();
      expect(await (await fetch(`${gateway}/responses`, { method: "POST" })).text()).toBe("data: 1\n\ndata: 2\n\n");
    },
    20_000,
  );

  test.concurrent(
    "a look at an account that is silent is ended by --timeout, not by Bun before",
    async () => {
      using account = startAccount((_, socket) => {
        setTimeout(() => socket.end(FREE), 12_000);
        return null;
      });
      const argv = ["--base-url", account.base, "--source", "costs", "--timeout", "20s"];
      await using breaker = await spawnBreaker(argv, { env: { ...withKey.env, BUN_CONFIG_HTTP_IDLE_TIMEOUT: "1" } });
      await until(() => /FALSE|Cannot read/.test(breaker.log()), 18_000);
      expect(breaker.log()).toContain("FALSE, no cost");
    },
    25_000,
  );

  test.concurrent.skipIf(!isLinux)(
    "100,000 STATUS later memory and file descriptors are back where they were (Linux)",
    async () => {
      using account = startAccount(always(FREE));
      await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
      const measure = () => ({
        files: readdirSync(`/proc/${breaker.pid}/fd`).length,
        kib: measureKib(breaker.pid),
      });
      let left = 0;
      let wrong = 0;
      const askMany = async () => {
        while (left-- > 0) {
          const answered = Promise.withResolvers<void>();
          const socket = {
            open: (peer: Bun.Socket) => void peer.write("STATUS\n"),
            data: (_: Bun.Socket, chunk: Buffer) => void (wrong += String(chunk) === "FALSE\n" ? 0 : 1),
            close: () => answered.resolve(),
          };
          await Bun.connect({ hostname: "127.0.0.1", port: breaker.port, socket });
          await answered.promise;
        }
      };
      const askAll = (count: number) => {
        left = count;
        return Promise.all(Array.from({ length: 50 }, askMany));
      };
      await askAll(5000); // to warm up
      const before = measure();
      await askAll(100_000);
      expect(wrong).toBe(0);
      await until(() => measure().files <= before.files);
      await until(() => measure().kib <= before.kib + 16 * 1024, 20_000);
    },
    60_000,
  );

  test.concurrent(
    "a client that never closes is cut off after its answer",
    async () => {
      using account = startAccount(always(FREE));
      await using breaker = await spawnBreaker(["--base-url", account.base, "--source", "costs"], withKey);
      const closed = Promise.withResolvers<number>();
      const startMs = performance.now();
      const socket = connect({ port: breaker.port, host: "127.0.0.1", allowHalfOpen: true });
      socket
        .on("data", () => {})
        .on("error", () => {})
        .on("close", () => closed.resolve(performance.now() - startMs));
      socket.write("STATUS\n");
      const silent = connect({ port: breaker.port, host: "127.0.0.1" });
      const cut = Promise.withResolvers<string>();
      let text = "";
      silent
        .on("data", (chunk) => (text += chunk))
        .on("error", () => {})
        .on("close", () => cut.resolve(text));
      expect(await closed.promise).toBeGreaterThan(9000);
      expect(await cut.promise).toBe("");
    },
    15_000,
  );

  test.concurrent(
    "the drill trips after 10 s and fires the hook once, with the variables and INFO",
    async () => {
      const folder = makeFolder();
      const line = '"$BREAKER_OPEN $BREAKER_REASON $BREAKER_COST $BREAKER_MESSAGE $MINE"';
      const hook = `echo ${line} >> ${folder}/fired; cat >> ${folder}/info; echo hello from the hook`;
      const argv = ["--drill", "--on-trip", hook, "--on-reset", `touch ${folder}/reset`];
      const env = { ...withKey.env, MINE: "in my drills" }; // The key of a drill is a common word.
      await using breaker = await spawnBreaker(argv, { env });
      expect(await breaker.ask("STATUS")).toBe("FALSE");
      await until(async () => (await breaker.ask("STATUS")) === "TRUE", 14_000);
      await until(() => breaker.log().includes("--on-trip: hello from the hook"));
      const { asOf } = await breaker.info();
      await until(async () => (await breaker.info()).asOf !== asOf); // another look
      expect(readFileSync(`${folder}/fired`, "utf8")).toMatch(
        /^TRUE cost 0.01 0.01 usd on \d{4}-\d\d-\d\d \(UTC\) in my drills\n$/,
      );
      expect(JSON.parse(readFileSync(`${folder}/info`, "utf8"))).toMatchObject({
        open: true,
        reason: "cost",
        source: "drill",
      });
      expect(existsSync(`${folder}/reset`)).toBe(false);
      expect(breaker.log()).toContain("looks at drill");
    },
    20_000,
  );

  test.concurrent(
    "an answer of the breaker that takes longer than its --timeout ends no command of exec",
    async () => {
      let asked = 0;
      const reply = (peer: Bun.Socket) => void peer.end("FALSE\n");
      const socket = {
        // STATUS and INFO come before the command, and then STATUS again.
        data: (peer: Bun.Socket) => void (asked++ === 2 ? setTimeout(reply, 11_000, peer) : reply(peer)),
      };
      using waking = Bun.listen({ hostname: "127.0.0.1", port: 0, socket });
      const untilFourth = () => (asked >= 4 ? true : null);
      const file = join(makeFolder(), "go");
      const wait = `while [ ! -e ${file} ]; do sleep 0.1; done; exit 7`;
      const child = spawnExec(["--port", String(waking.port), "--", "sh", "-c", wait]);
      await until(untilFourth, 28_000); // Some 14 s where the machine is not busy.
      writeFileSync(file, "");
      expect(await child.exited).toBe(7);
    },
    35_000,
  );

  const call = (id: string) => Buffer.from(`${request(id, "tools/call", { name: "breaker_status" })}\n`);
  const longCall = call("x".repeat(60_000));
  type Load = { connections: number; rounds: number; bytes: Buffer };

  /** Sends `bytes` again and again over some connections, until that is done or nothing more is taken. */
  async function flood(port: number, { connections, rounds, bytes }: Load) {
    let [done, lastMs] = [0, performance.now()];
    const sockets = Array.from({ length: connections }, () => connect({ port, host: "127.0.0.1" }));
    for (const socket of sockets) {
      let left = rounds;
      const send = () => {
        lastMs = performance.now();
        while (left > 0 && socket.write(bytes)) left--;
        if (left === 0) done++;
      };
      socket
        .on("connect", send)
        .on("drain", () => left-- > 0 && send())
        .on("error", () => done++);
    }
    await until(() => done >= connections || performance.now() - lastMs > 1000, 20_000);
    return () => sockets.forEach((socket) => socket.destroy());
  }

  /** Sends `bytes` as far as they are taken at once, and leaves, one connection after another. */
  async function comeAndLeave(port: number, { connections, bytes }: Load) {
    let left = connections;
    const keepLeaving = async () => {
      while (left-- > 0) {
        const gone = Promise.withResolvers<void>();
        const socket = connect({ port, host: "127.0.0.1" });
        socket.on("error", () => {}).on("close", () => gone.resolve());
        socket.on("connect", () => {
          socket.write(bytes);
          setTimeout(() => socket.destroy(), 100);
        });
        await gone.promise;
      }
    };
    await Promise.all(Array.from({ length: 100 }, keepLeaving));
    return () => {};
  }

  const blank = Buffer.from(`${request(1, "ping")}\n${`${" ".repeat(60_000)}\n`.repeat(8)}${call("1")}`);
  const floods: [string, typeof flood, Load][] = [
    ["that repeat one id", flood, { connections: 1, rounds: 320, bytes: Buffer.alloc(76_000, call("1")) }],
    ["with ids of 60 KB on 60 connections", flood, { connections: 60, rounds: 64, bytes: longCall }],
    ["behind 480 KB of blanks on 500 connections", flood, { connections: 500, rounds: 1, bytes: blank }],
    ["of clients that leave", comeAndLeave, { connections: 1000, rounds: 1, bytes: Buffer.alloc(480_000, longCall) }],
  ];
  test.concurrent.skipIf(!isLinux).each(floods)(
    "calls %s, while the first look hangs, cost less than 64 MiB (Linux)",
    async (_, send, load) => {
      using account = startAccount(always(null));
      const argv = ["--base-url", account.base, "--source", "costs", "--timeout", "60s"];
      await using breaker = await spawnBreaker(argv, withKey);
      expect(await breaker.ask("HELP")).toStartWith("STATUS");
      const before = measureKib(breaker.pid);
      const end = await send(breaker.port, load);
      expect(await breaker.ask("HELP")).toStartWith("STATUS");
      // What is kept counts, not what still waits for the garbage collector.
      await until(() => measureKib(breaker.pid) - before < 64 * 1024, 20_000);
      end();
    },
    40_000,
  );

  test.concurrent.skipIf(!isLinux)(
    "requests of programs that leave, while the first look hangs, cost less than 32 MiB (Linux)",
    async () => {
      using account = startAccount(always(null));
      const argv = ["--base-url", account.base, "--source", "costs", "--timeout", "60s", "--gateway", "0"];
      await using breaker = await spawnBreaker(argv, withKey);
      const port = await until(() => Number(/the gateway is \S+:(\d+)/.exec(breaker.log())?.[1]));
      const before = measureKib(breaker.pid);
      const head = `GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\nX: ${"x".repeat(15_000)}\r\n\r\n`;
      await comeAndLeave(port, { connections: 3000, rounds: 1, bytes: Buffer.from(head) });
      await until(() => measureKib(breaker.pid) - before < 32 * 1024, 20_000);
    },
    40_000,
  );

  test.concurrent.skipIf(!isLinux)(
    "stops its command and what descends from it within 3 s of a trip (Linux)",
    async () => {
      await using guarded = await startGuarded(FREE);
      const file = join(makeFolder(), "pids");
      // The second sleep has left the group and the session.
      const command = `sleep 60 & echo $! > ${file}; setsid sleep 60 & echo $! >> ${file}; wait`;
      const child = spawnExec([...guarded.at, "--", "bash", "-c", command]);
      const pids = await until(() => {
        const lines = existsSync(file) ? readFileSync(file, "utf8").trim().split("\n") : [];
        return lines.length === 2 ? lines.map(Number) : null;
      });
      guarded.state.answer = CENT;
      await until(async () => (await guarded.breaker.ask("STATUS")) === "TRUE");
      const startMs = performance.now();
      expect(await child.exited).toBe(75);
      expect(performance.now() - startMs).toBeLessThan(3000);
      await until(() => !pids.some(isRunning), 1000);
      expect(await new Response(child.stderr).text()).toContain("the breaker is open, stopping bash: 0.01 usd");
    },
    15_000,
  );

  test.concurrent(
    "kills a command that ignores SIGTERM 10 s later, and calls a breaker that went away open after 10 s",
    async () => {
      await using guarded = await startGuarded(FREE);
      const stubborn = spawnExec([...guarded.at, "--", "sh", "-c", 'trap "" TERM; echo ready; sleep 60']);
      let orphan: ReturnType<typeof spawnExec>;
      {
        using account = startAccount(always(FREE));
        await using leaving = await spawnBreaker(["--base-url", account.base, "--source", "costs"], {
          env: { OPENAI_ADMIN_KEY: KEY },
        });
        orphan = spawnExec(["--port", String(leaving.port), "--", "sh", "-c", "echo ready; exec sleep 60"]);
        for (const child of [stubborn, orphan])
          expect(new TextDecoder().decode((await child.stdout.getReader().read()).value)).toBe("ready\n");
        guarded.state.answer = CENT;
        await until(async () => (await guarded.breaker.ask("STATUS")) === "TRUE");
      }
      const startMs = performance.now();
      const timed = async (child: typeof orphan) => [
        await child.exited,
        Math.round((performance.now() - startMs) / 1000),
      ];
      const [[stubbornCode, stubbornSeconds], [orphanCode, orphanSeconds]] = await Promise.all([
        timed(stubborn),
        timed(orphan),
      ]);
      expect([stubbornCode, orphanCode]).toEqual([75, 75]);
      expect(stubbornSeconds).toBeWithin(9, 15);
      expect(orphanSeconds).toBeWithin(9, 15);
      expect(await new Response(orphan.stderr).text()).toContain("No breaker answers");
    },
    25_000,
  );
});

// ── The siege ───────────────────────────────────────────────────────────────────────────────────
// An account that misbehaves at random, clients that send noise, programs that spend through the gateway,
// and days that pass within seconds.
// A model that knows what was served says when FALSE may be said; it shares no code with the breaker.

/** What the account has served to one look. */
interface Served {
  beganMs: number;
  /** How often the clock had been set back by then. */
  setbacks: number;
  /** Whether the breaker can have seen everything. */
  complete: boolean;
  /** What it must have seen, by UTC day. */
  costs: Map<string, number>;
  tokens: Map<string, number>;
}

/** xorshift32: the same numbers for the same seed. */
function createRandom(seed: number) {
  let state = Math.imul(seed, 2654435761) || 1;
  const next = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  const below = (limit: number) => Math.floor(next() * limit);
  return {
    below,
    chance: (share: number) => next() < share,
    pick: <T>(first: T, ...others: T[]): T => others[below(others.length + 1) - 1] ?? first,
  };
}

async function besiege({ seed, steps, allowance }: { seed: number; steps: number; allowance: number | null }) {
  const { below, chance, pick } = createRandom(seed);
  // Each path has its own luck: two that are asked at once come in any order.
  const lucks = { costs: createRandom(seed + 100), tokens: createRandom(seed + 200), models: createRandom(seed + 300) };
  const dayOf = (ms: number) => new Date(ms).toISOString().slice(0, 10);
  let nowMs = Date.parse("2026-01-30T12:00:00Z");
  const spent = new Map<string, number>();
  const used = new Map<string, number>();
  const add = (ledger: Map<string, number>, amount: number) =>
    ledger.set(dayOf(nowMs), (ledger.get(dayOf(nowMs)) ?? 0) + amount);
  const looks: Served[] = [];
  /** The tokens of all looks, read or not. */
  const served: Map<string, number>[] = [];
  let setbacks = 0;
  let current: Served = { beganMs: 0, setbacks, complete: false, costs: new Map(), tokens: new Map() };
  const done = new Set<string>();
  let isHanging = false;
  /** What answers through the gateway have told: tokens by the day of the answer, each id once. */
  const live = new Map<string, number>();
  /** The same, where ids are forgotten when the clock enters another day. */
  const liveAtMost = new Map<string, number>();
  const counted = new Set<string>();
  let [clockDay, clockDays] = ["", 0];
  let lastTold = { id: "", tokens: 0, created: 0 };

  /** One answer of a model, in one of the shapes that tell their tokens, or in one that does not. */
  function spend(socket: Bun.Socket<{ text: string }>): string | null {
    const { below, chance, pick } = lucks.models;
    if (chance(0.8)) lastTold = { id: crypto.randomUUID(), tokens: below(150), created: Math.floor(nowMs / 1000) };
    const { id, tokens, created } = lastTold;
    if (clockDay !== dayOf(nowMs)) clockDays++;
    clockDay = dayOf(nowMs);
    const tell = (text: string) => {
      const day = dayOf(created * 1000);
      const countOnce = (ledger: Map<string, number>, name: string) => {
        if (!counted.has(name)) ledger.set(day, (ledger.get(day) ?? 0) + tokens);
        counted.add(name);
      };
      countOnce(live, id);
      countOnce(liveAtMost, `${clockDays} ${id}`);
      return text;
    };
    const usage = { prompt_tokens: tokens, completion_tokens: 0 };
    const chunk = { id, model: "m", created, choices: [{ delta: {} }] };
    const headers = { "Content-Type": chance(0.5) ? "application/json" : "application/json; charset=utf-8" };
    const stream = { headers: { "Content-Type": "text/event-stream" } };
    switch (below(7)) {
      case 0:
        return tell(http({ ...chunk, usage }, { headers }));
      case 1:
        return tell(http(formatEvents([chunk, { ...chunk, choices: [], usage }, "[DONE]"]), stream));
      case 2: {
        const response = { id, model: "m", created_at: created, usage: { input_tokens: 0, output_tokens: tokens } };
        return tell(
          http(formatEvents([{ response: { ...response, usage: null } }, { response }], pick("\n", "\r\n")), stream),
        );
      }
      case 3:
        return http({ object: "list", model: "m", usage: { prompt_tokens: 500, total_tokens: 500 } }, { headers });
      case 4:
        return http({ ...chunk, usage }, { status: pick(400, 429, 500), headers });
      case 5: // cut before its usage
        return http(formatEvents([chunk, { ...chunk, choices: [], usage }]), stream).slice(
          0,
          -60 - String(tokens).length,
        );
      default: // hangs until the client leaves
        socket.write("HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\ndata: {}\n\n");
        return null;
    }
  }

  /** One answer of the account: mostly honest, else broken in one of many ways. */
  const respond: Respond = ({ path, query }, socket) => {
    if (!path.startsWith("/v1/organization/")) return spend(socket);
    const isCosts = path === COSTS;
    const { below, chance, pick } = isCosts ? lucks.costs : lucks.tokens;
    const firstMs = Number(query.get("start_time")) * 1000;
    const days = [...(isCosts ? spent : used)]
      .filter(([day]) => Date.parse(day) >= firstMs && Date.parse(day) <= nowMs)
      .sort();
    const at = Number(query.get("page") ?? 0);
    const size = pick(1, 2, 31);
    const shown = days.slice(at, at + size);
    const more = at + size < days.length;
    const buckets: unknown[] = shown.map(([day, amount]) => ({
      start_time: Date.parse(day) / 1000,
      results: [
        isCosts
          ? { amount: { value: chance(0.5) ? amount : amount.toFixed(12), currency: "usd" } }
          : { input_tokens: amount, output_tokens: 0, model: "m" },
      ],
    }));
    const answer = page(buckets, more ? String(at + size) : null);
    /** Notes what the breaker can read of an answer: nothing, its rows, or also that they are all. */
    const serve = (what: "nothing" | "rows" | "all", text: string) => {
      const seen = isCosts ? current.costs : current.tokens;
      if (what !== "nothing") for (const [day, amount] of shown) seen.set(day, amount);
      if (what === "all" && !more) done.add(path);
      current.complete = done.size === (allowance === null ? 1 : 2);
      return text;
    };
    const dated = { headers: { Date: new Date(nowMs).toUTCString() } };
    if (chance(0.6)) return serve("all", http(answer, dated));
    switch (below(14)) {
      case 0:
        return serve("nothing", http({ error: "x" }, { status: pick(400, 401, 403, 404, 429, 500, 503) }));
      case 1:
        return serve("nothing", http(answer, { status: pick(201, 302, 500) }));
      case 2:
        return serve("nothing", http({ ...answer, error: { message: "x" } }));
      case 3:
        return serve("nothing", http(JSON.stringify(answer).slice(0, -1 - below(20))));
      case 4:
        return serve("nothing", http(answer).slice(0, -3));
      case 5:
        return serve(
          "nothing",
          http(answer, { headers: { Date: new Date(nowMs + pick(-1, 1) * 3_600_000).toUTCString() } }),
        );
      case 6:
        return serve("rows", http({ ...answer, data: [{ start_time: firstMs / 1000, results: [{}] }, ...buckets] }));
      case 7:
        return serve("rows", http({ ...answer, has_more: true, next_page: pick("", null) }));
      case 8:
        return serve("rows", http({ ...answer, has_more: undefined }));
      case 9:
        return serve("rows", http({ ...answer, object: "list" }));
      case 10:
        socket.terminate();
        return serve("nothing", "");
      case 11:
        return serve("nothing", chance(0.9) ? http("<html>") : http(" ".repeat(2 ** 20 + 1)));
      case 12:
        isHanging = chance(0.1);
        return isHanging ? null : serve("nothing", "");
      default: {
        const late = serve("all", http(answer, dated));
        setTimeout(() => {
          socket.write(late);
          socket.end();
        }, below(8));
        return null;
      }
    }
  };

  /** Whether FALSE may be said now, from nothing but what was served. */
  function mayBeFalse(): boolean {
    // By a clock that was set back, nobody can tell how old an earlier look is.
    const good = looks.findLastIndex((look) => look.complete && look.setbacks === setbacks);
    const beganMs = looks[good]?.beganMs ?? -Infinity;
    if (Math.abs(nowMs - beganMs) > 600_000) return false;
    const yesterday = dayOf(nowMs - DAY);
    if (dayOf(beganMs - DAY) > yesterday) return false; // It did not ask for all of the window.
    if (allowance !== null && (live.get(dayOf(nowMs)) ?? 0) >= allowance) return false;
    return looks.slice(good).every(({ costs, tokens }) => {
      const costly = [...costs].some(([day, amount]) => day >= yesterday && amount > 0);
      return !costly && (allowance === null || (tokens.get(dayOf(nowMs)) ?? 0) < allowance);
    });
  }

  using account = startAccount(respond);
  const stop = new AbortController();
  const argv = ["--host", "127.0.0.1", "--port", "0", "--base-url", account.base, "--source", "costs"];
  argv.push("--timeout", "500ms", "--interval", "24h");
  if (allowance !== null) argv.push("--allowance", `*=${allowance}`);
  const world: World = {
    ...surround({ now: () => nowMs }),
    options: optionsOf(...argv),
    rest: [],
    self: { startedMs: nowMs, gateway: null, keys: [] },
    stop: () => stop.abort(),
    signal: stop.signal,
  };
  const { look: lookForReal } = createLook(world);
  let lookEnded = Promise.withResolvers<void>();
  const watch = startWatch(world, {
    async look(onSeen) {
      done.clear();
      const mine: Served = { beganMs: nowMs, setbacks, complete: false, costs: new Map(), tokens: new Map() };
      current = mine;
      isHanging = false;
      served.push(mine.tokens);
      const found = await lookForReal(onSeen);
      // On a machine so busy that a whole answer is late, or by a clock that has jumped so far from its Date, nobody can
      // tell what was read of it.
      const isLate = found.error?.includes("timed out") && !isHanging;
      if (isLate || Math.abs(nowMs - mine.beganMs) > 590_000)
        Object.assign(mine, { complete: false, costs: new Map(), tokens: new Map() });
      looks.push(mine);
      lookEnded.resolve();
      return found;
    },
    onAnswer: () => {},
  });
  const violations: string[] = [];
  let falses = 0;
  let passes = 0;
  /** What was decided since the last question: noise that comes between decides too. */
  const decided = new Set<string>();
  const note = (what: string) => void violations.push(`seed ${seed}: ${what} at ${new Date(nowMs).toISOString()}`);
  /** Whether something was asked since the last step that rests on a look: noise is answered without a look at the clock. */
  let isAsked = false;
  const answers = {
    ...watch,
    whenSettled() {
      isAsked = true;
      return watch.whenSettled();
    },
    describe() {
      const decision = watch.describe();
      decided.add(decision.open ? "TRUE\n" : "FALSE\n");
      if (!decision.open) falses++;
      if (!decision.open && isAsked && !mayBeFalse()) note("FALSE");
      return decision;
    },
  };
  const server = startServer(world, answers);
  const gateway = startGateway(world, answers);

  /** A program's request through the gateway: it passes just where STATUS says FALSE, and counts the larger figure. */
  async function sendRequest(): Promise<void> {
    const leaving = new AbortController();
    const init = { method: "POST", body: JSON.stringify({ stream: chance(0.5) }), signal: leaving.signal };
    const before = account.requests.length;
    decided.clear();
    const text = await readSome(fetch(`${gateway.url}/chat/completions`, init), leaving);
    const isRefused = text.includes('"breaker_open"');
    if (!isRefused) passes++;
    const went = account.requests.slice(before).some(({ path }) => !path.startsWith("/v1/organization/"));
    const isDecided = decided.has(isRefused ? "TRUE\n" : "FALSE\n");
    if (!isDecided || isRefused === went) note(`decided ${[...decided]}, and the gateway ${text}`);
    const day = dayOf(nowMs);
    const sum = (figures: Map<string, number>[]) => {
      const days = new Set(figures.flatMap((figure) => [...figure.keys()]).filter((one) => one >= day));
      return [...days].reduce((total, one) => total + Math.max(...figures.map((figure) => figure.get(one) ?? 0)), 0);
    };
    // A good look replaces what earlier ones have told; whether it was good is not for this model to say.
    const least = sum([
      live,
      ...looks.slice(looks.findLastIndex(({ complete }) => complete)).map(({ tokens }) => tokens),
    ]);
    const most = sum([liveAtMost, ...served]);
    const count = watch.describe().allowances[0]?.used ?? 0;
    if (allowance !== null && !(count >= least && count <= most)) note(`${count} tokens counted, not ${least}`);
  }

  /** Reads an answer to its end; leaves one that hangs, and bears one that is cut. */
  async function readSome(asked: Promise<Response>, leaving: AbortController): Promise<string> {
    let text = "";
    try {
      for await (const piece of (await asked).body ?? []) {
        text += Buffer.from(piece).toString();
        if (text === "data: {}\n\n") leaving.abort();
      }
    } catch {} // Cut, or left.
    return text;
  }

  function sendNoise(): void {
    const bytes = Uint8Array.from({ length: below(400) }, () => pick(10, 13, 32, 123, 83, 255, below(256)));
    const socket = connect({ port: server.port, host: "127.0.0.1" });
    socket.on("error", () => {}).on("data", () => {});
    for (let at = 0; at < bytes.length; at += 100) socket.write(bytes.subarray(at, at + 100));
    if (chance(0.5)) socket.end();
    else setTimeout(() => socket.destroy(), 5);
  }

  for (let step = 0; step < steps; step++) {
    add(spent, 0);
    isAsked = false;
    switch (below(10)) {
      case 0:
        nowMs += below(8000);
        break;
      case 1:
        nowMs += pick(59_000, 300_000, 599_000, 601_000, 3_600_000);
        break;
      case 2: // to just before midnight
        if (chance(0.4)) nowMs = Date.parse(dayOf(nowMs)) + DAY - pick(1, 5000, 300_000);
        break;
      case 3: // the clock is set back
        if (chance(0.3)) {
          const byMs = pick(5000, 300_000, 700_000);
          nowMs -= byMs;
          if (byMs > 10_000) setbacks++;
        }
        break;
      case 4:
        if (chance(0.1)) add(spent, pick(0.01, 1e-9, 3));
        break;
      case 5:
        if (chance(0.7)) add(used, below(600));
        break;
      case 6:
        sendNoise();
        break;
      case 7:
        for (let i = below(4); i >= 0; i--) await sendRequest();
        break;
      default:
        lookEnded = Promise.withResolvers();
        watch.hurry();
        if (chance(0.7)) await lookEnded.promise;
    }
    decided.clear();
    const answer = await talk(server.port, ["STATUS\n"]);
    if (!decided.has(answer)) note(`decided ${[...decided]}, answered ${answer}`);
    if (chance(0.1)) watch.tick();
  }
  stop.abort();
  await Promise.all([server.stop(), gateway.stop()]);
  return { violations, falses, passes, requests: account.requests.length };
}

suite("the siege", () => {
  test.each([1, 3, 5, 7, 10, 12, 14, 16])(
    "of seed %d: FALSE only where a complete look saw nothing spent",
    async (seed) => {
      const { violations, falses, passes, requests } = await besiege({
        seed,
        steps: 500,
        allowance: seed % 2 === 0 ? 3000 : null,
      });
      expect(violations).toEqual([]);
      // Were nothing ever FALSE, or little ever asked, this would show nothing.
      expect(falses).toBeGreaterThan(20);
      expect(passes).toBeGreaterThan(5);
      expect(requests).toBeGreaterThan(100);
    },
    30_000,
  );
});
