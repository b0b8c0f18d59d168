#!/usr/bin/env -S bun -i --no-env-file
/// <reference types="bun-types" />
/**
 * breaker: a circuit breaker for the costs of an OpenAI account.
 *
 *     bun breaker.ts --drill                    # see it trip, without an account
 *     pass insert OPENAI_API_KEY                # an admin key with the scope api.usage.read
 *     bun breaker.ts                            # answer on port 5555 until stopped
 *     echo STATUS | nc localhost 5555           # TRUE or FALSE
 *     bun breaker.ts exec -- CMD                # run CMD only as long as the answer is FALSE
 *
 * The breaker is closed (FALSE: work may go on) or open (TRUE: stop). It is open when the account
 * incurred a cost in the current or the previous UTC day, and whenever that is not known:
 *
 *     It never says FALSE without having seen, recently and completely, that nothing was spent.
 *
 * Exit codes: 0 closed or done, 1 open, 64 usage, 69 unknown or no breaker, 75 stopped by the breaker;
 * `exec` otherwise ends with the exit code of its command.
 *
 * The file reads from top to bottom: options, schemas, money and time, the decision, the protocol and
 * MCP are pure; the effects follow; `main` comes last. Importing it does nothing.
 *
 * @module
 */
import { existsSync, readdirSync, readFileSync, write, writeSync } from "node:fs";
import { basename } from "node:path";
import { parseArgs } from "node:util";
import { z } from "zod@4.6.7";

export const VERSION = "1.0.0";

const EXIT = { closed: 0, open: 1, usage: 64, unavailable: 69, stopped: 75, notExecutable: 126, notFound: 127 };

// ── Options ─────────────────────────────────────────────────────────────────────────────────────
// One table drives the flags, the BREAKER_* variables, the defaults, the validation and --help.

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

/** A text of a form; `expects` is what the user is told where it has another. */
function text(form: RegExp, expects: string) {
  return z.string().regex(form).meta({ expects });
}

const UNITS = new Map(Object.entries({ ms: 1, s: SECOND, m: MINUTE, h: HOUR, "": 1, k: 1e3, M: 1e6, G: 1e9 }));

/** A number with a unit, as the number: `"10m"` → 600000, `"1.5M"` → 1500000. */
function scaled(form: RegExp, { min = 0, max = Infinity, expects = "" }) {
  const scale = (text: string) => Number.parseFloat(text) * (UNITS.get(text.replace(/^[\d.]+/, "")) ?? NaN);
  const range = z.number().min(min).max(max);
  return text(form, expects).transform(scale).pipe(range).meta({ expects });
}

const truth = z
  .stringbool({ truthy: ["true"], falsy: ["false"], case: "sensitive" })
  .meta({ expects: "true or false" });
const command = text(/^[^\0]*$/, "a shell command");
const word = text(/^[^\s\p{Cc}]+$/u, "a word");
const host = word.meta({ expects: "a host name or an address" });
const port = scaled(/^\d{1,5}$/, { max: 65535, expects: "a port from 0 to 65535" });
const amount = scaled(/^(\d+\.?\d*|\.\d+)$/, { expects: "an amount such as 0, 0.5 or 20" });
const times = "a duration from 1ms to 24h such as 500ms, 30s, 10m or 1h";
const duration = scaled(/^\d+(ms|s|m|h)$/, { min: 1, max: DAY, expects: times });
const projects = z.array(word).meta({ expects: "a project ID such as proj_abc" });
const source = z.enum(["auto", "costs", "billing"]).meta({ expects: "auto, costs or billing" });
const passEntry = text(/^[^\p{Cc}]*[^\p{Cc}\s/]$/u, "the name of an entry of pass");

/** `"*-mini*,*-nano*=10M"` → `{ models: "*-mini*,*-nano*", limit: 10000000 }`, in tokens a UTC day. */
const allowance = word
  .regex(/^[^,=]+(,[^,=]+)*=[^=]+$/)
  .transform((text) => text.split("=", 2))
  .pipe(z.tuple([z.string(), scaled(/^\d+(\.\d+)?[kMG]?$/, { min: Number.MIN_VALUE })]))
  .transform(([models, limit]) => ({ models, limit }));
const allowances = z.array(allowance).meta({ expects: "MODELS=TOKENS such as *-mini*,*-nano*=10M" });

/** An http URL sends the key in the clear: only to this machine. */
const baseUrl = z
  .url({ protocol: /^https?$/ })
  .transform((text) => new URL(text))
  .refine((url) => url.protocol === "https:" || isLoopback(url.hostname))
  .refine((url) => !url.username && !url.password && !url.search && !url.hash)
  .transform((url) => url.href.replace(/\/+$/, ""))
  .meta({ expects: "an https URL (http only to this machine) without user, query and fragment" });

/** Whether a host name or an address, also an IPv4 one written as IPv6, is this machine's loopback. */
export function isLoopback(host: string): boolean {
  return /^(localhost|(::ffff:)?127(\.\d{1,3}){3}|\[?::1\]?)$/.test(host);
}

/** Each description is the flag, what it takes, what counts where it is not given (and in a drill), and what it does. */
const OptionsSchema = z.object({
  host: host.describe("--host HOST [0.0.0.0] : where to listen, and where to ask"),
  port: port.describe("--port PORT [5555] : its port; 0 listens on any free one and logs it"),
  thresholdUsd: amount.describe("--threshold USD [0] : open when the two days together cost more than this"),
  allowances: allowances.describe("--allowance MODELS=TOKENS : open when today's tokens reach this; repeatable"),
  projects: projects.describe("--project ID : count the costs of these projects only; repeatable"),
  intervalMs: duration.describe("--interval TIME [60s, 1s in a drill] : between two looks at the account"),
  timeoutMs: duration.describe("--timeout TIME [10s] : for one request, its body included"),
  maxAgeMs: duration.describe("--max-age TIME [10m] : how long a good look counts"),
  whenUnknown: truth.describe("--when-unknown true|false [true] : what STATUS answers when the state is unknown"),
  source: source.describe("--source NAME [auto] : costs or billing; auto is costs on openai.com, else billing"),
  baseUrl: baseUrl.describe("--base-url URL [https://api.openai.com/v1] : of the API"),
  passEntry: passEntry.describe("--pass-entry NAME [OPENAI_API_KEY] : holds the key, unless OPENAI_ADMIN_KEY does"),
  onTrip: command.describe("--on-trip CMD : run by sh when the answer turns TRUE"),
  onReset: command.describe("--on-reset CMD : run by sh when the answer turns FALSE"),
  drill: truth.describe("--drill : a simulated account that costs a cent after 10 s"),
  json: truth.describe("--json : check prints the INFO object"),
});

export type Options = z.output<typeof OptionsSchema>;
export type Env = Record<string, string | undefined>;

const COMMANDS = {
  serve: "answer on TCP until stopped (the default)",
  check: "look at the account once and say what it costs: exit 0 closed, 1 open, 69 unknown",
  status: "ask a running breaker: exit 0 FALSE, 1 TRUE, 69 no answer",
  stop: "stop the breaker that runs on this machine: exit 0, 69 none stopped",
  exec: "exec -- CMD: run CMD while the breaker is closed: exit 75 when stopped by it",
  mcp: "speak MCP on stdin and stdout for a running breaker",
};
const CommandSchema = z.enum(["serve", "check", "status", "stop", "exec", "mcp"]);

/** What a command line asks for: a command with its options, or a text to print. */
export type Invocation =
  { command: z.output<typeof CommandSchema>; options: Options; rest: string[] } | { command: "print"; text: string };

/** A command line or a variable that cannot be followed; the message is one sentence for the user. */
export class UsageError extends Error {}

/** The table of the flags; one that takes nothing is a switch. */
const ROWS = Object.entries(OptionsSchema.shape).map(([key, schema]) => {
  const form = /^--(\S+)(?: ([A-Z=a-z|]+))??(?: \[(\S+?)(?:, (\S+) in a drill)?\])? : (.*)$/;
  const [, name = "", takes, fallback = takes ? "" : "false", drillFallback = fallback, help = ""] =
    form.exec(schema.description ?? "") ?? [];
  const { expects } = schema.meta() ?? {};
  return { key, schema, name, takes, fallback, drillFallback, help, expects, many: schema instanceof z.ZodArray };
});

/** The text of `--help`, made from the tables. */
export function formatHelp(): string {
  const line = (left: string, right: string) => `  ${left.padEnd(27)} ${right}`;
  const commands = Object.entries(COMMANDS).map(([name, help]) => line(name, help));
  const suffix = (fallback: string) => (fallback && fallback !== "false" ? ` [${fallback}]` : "");
  const options = ROWS.map((row) => line(`--${row.name} ${row.takes ?? ""}`, row.help + suffix(row.fallback)));
  return `breaker ${VERSION}: has this OpenAI account cost anything today or yesterday (UTC)?

Usage: bun breaker.ts [command] [options]

${commands.join("\n")}

${options.join("\n")}
${line("-h, --help", "this text")}
${line("-V, --version", "the version")}

Each option is also a variable (--max-age is BREAKER_MAX_AGE), where blanks separate the values of
a repeatable one; the flag wins. A TIME is 500ms, 30s, 10m or 1h; TOKENS may end in k, M or G.
Exit codes: 0 closed or done, 1 open, 64 usage, 69 unknown or no breaker, 75 stopped by it.
`;
}

/**
 * Reads a command line (without program and script) and the environment.
 * Throws a UsageError that names what was wrong, and what was expected.
 *
 *     parseArguments(["check", "--timeout", "5s"], {}) → { command: "check", options: { timeoutMs: 5000, … }, rest: [] }
 */
export function parseArguments(argv: string[], env: Env): Invocation {
  const dashes = argv.includes("--") ? argv.indexOf("--") : argv.length;
  const words = argv.slice(0, dashes);
  const rest = argv.slice(dashes + 1);
  if (words.includes("-h") || words.includes("--help")) return { command: "print", text: formatHelp() };
  if (words.includes("-V") || words.includes("--version")) return { command: "print", text: `${VERSION}\n` };

  const types = ROWS.map(({ name, takes }) => [name, { type: takes ? "string" : "boolean", multiple: true }] as const);
  const read = parseArgs({ args: words, options: Object.fromEntries(types), allowPositionals: true, strict: false });
  const given = new Map(Object.entries(read.values).map(([name, value = []]) => [name, [value].flat()]));
  const stray = [...given.keys()].find((name) => !ROWS.some((row) => row.name === name));
  if (stray) {
    const bad = words.find((one) => one.startsWith("-") && one.includes(stray));
    throw new UsageError(`${bad}: no such option, expected one of those in --help`);
  }
  const drilling = String(given.get("drill")?.at(-1) ?? env["BREAKER_DRILL"]) === "true";
  const texts: Record<string, unknown> = {};
  for (const { key, schema, name, takes, many, fallback, drillFallback, expects } of ROWS) {
    const variable = `BREAKER_${name.replaceAll("-", "_").toUpperCase()}`;
    const flags = given.get(name);
    if (takes && flags?.some((one) => one === true || String(one).startsWith("--"))) {
      throw new UsageError(`--${name}: expected ${expects} after it; see --help`);
    }
    const text = env[variable] || (drilling ? drillFallback : fallback);
    const list = flags?.map(String) ?? (many ? text.split(/\s+/).filter(Boolean) : [text]);
    texts[key] = many ? list : list.at(-1);
    const [issue] = schema.safeParse(texts[key]).error?.issues ?? [];
    if (issue) {
      const bad = JSON.stringify(many ? list[Number(issue.path[0])] : list.at(-1));
      throw new UsageError(`${flags ? `--${name}` : variable} ${bad}: expected ${expects}; see --help`);
    }
  }
  const options = OptionsSchema.parse(texts);

  const [first = "serve", extra] = read.positionals;
  const named = CommandSchema.safeParse(first);
  if (!named.success) throw new UsageError(`${first}: expected a command, one of those in --help`);
  if (extra !== undefined) throw new UsageError(`${extra}: expected nothing more after ${first}; see --help`);
  if (named.data === "exec" ? rest.length === 0 : dashes < argv.length) {
    throw new UsageError(`${first}: expected exec -- CMD, the only command with a --; see --help`);
  }
  if (resolveSource(options) === "billing" && options.allowances.length + options.projects.length > 0) {
    const [name, value] = options.projects[0]
      ? ["--project", options.projects[0]]
      : ["--allowance", options.allowances[0]?.models];
    throw new UsageError(`${name} "${value}": expected --source costs with it, billing cannot tell; see --help`);
  }
  return { command: named.data, options, rest };
}

/** Which account is looked at, and how; a drill simulates the Costs API. */
export function resolveSource({ source, baseUrl, drill }: Options): "costs" | "billing" | "drill" {
  if (drill) return "drill";
  if (source !== "auto") return source;
  return /(^|\.)openai\.com$/.test(new URL(baseUrl).hostname) ? "costs" : "billing";
}

// ── Schemas ─────────────────────────────────────────────────────────────────────────────────────
// Every byte from outside passes one of these. Unknown members are left alone: OpenAI adds some.

/** What a cost counts as that is too small for a number. */
const TINY = 1e-300;

/**
 * An amount: a number, or a string as OpenAI sends them live (`"0E-6176"`, `"0.1739150000000000"`).
 * Missing, empty and non-finite ones are refused; only zero is 0.
 */
export const AmountSchema = z
  .union([z.number(), z.string().regex(/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i)])
  .transform((value) => {
    if (Math.abs(Number(value)) >= TINY) return Number(value);
    return /^[^e-]*[1-9]/i.test(String(value)) ? TINY : 0;
  })
  .pipe(z.number());

/** Unix seconds from 2001 to 2286, so that milliseconds do not pass for a far day. */
const SecondsSchema = z.number().min(1e9).max(1e10);

/** `Date.UTC(2026, 10, 22, 23, 59)` → `"2026-11-22"` */
export function formatDay(ms: number): string {
  return new Date(ms).toISOString().slice(0, 10);
}

/** The first and the last UTC day of a bucket, in Unix seconds; without an end it is a day long. */
function listSpan(start: number, end = start + 86400): { day: string; lastDay: string } {
  const lastSecond = Math.max(start, end - 1);
  return { day: formatDay(start * SECOND), lastDay: formatDay(lastSecond * SECOND) };
}

const JsonSchema = z.looseObject({});
const ListSchema = z.array(z.unknown());

/** Parses JSON; undefined for a text that is none. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

const CurrencySchema = z.string().regex(/^[a-z]{3}$/i);

export const CostRowSchema = z
  .object({ amount: z.object({ value: AmountSchema, currency: CurrencySchema.nullish() }) })
  .transform(({ amount }) => ({ cost: amount.value, currency: amount.currency?.toLowerCase() ?? "usd" }));

/** `input_tokens` holds the cached ones already. A long name would make globs slow. */
export const UsageRowSchema = z
  .object({ input_tokens: z.int().min(0), output_tokens: z.int().min(0), model: z.string().max(256).nullable() })
  .transform((row) => ({ tokens: row.input_tokens + row.output_tokens, model: row.model ?? "" }));

/** A day of costs or of tokens. Older answers call `results` `result`. */
const BucketSchema = z
  .object({
    start_time: SecondsSchema,
    end_time: SecondsSchema.optional(),
    results: ListSchema.optional(),
    result: ListSchema.optional(),
  })
  .refine(({ results, result }) => results ?? result, "expected results")
  .refine((bucket) => (bucket.end_time ?? 0) <= (Math.floor(bucket.start_time / 86400) + 1) * 86400, "expected one day")
  .transform(({ start_time, end_time, results = [], result = [] }) => ({
    ...listSpan(start_time, end_time),
    rows: [...results, ...result],
  }));

const PageSchema = z.object({
  object: z.literal("page").optional(),
  has_more: z.boolean(),
  next_page: z.string().nullish(),
});

const BillingSchema = z.object({ total_usage: AmountSchema });
const BillingDaySchema = z
  .object({ timestamp: SecondsSchema, line_items: ListSchema })
  .transform(({ timestamp, line_items }) => ({ ...listSpan(timestamp), line_items }));
const BillingItemSchema = z.object({ cost: AmountSchema });

/** A refusal: OpenAI's `error` is an object or a bare string. */
const RefusalSchema = z.object({
  error: z.union([z.string(), z.object({ message: z.string() }).transform(({ message }) => message)]),
});

/** What INFO says; the MCP tool says the same without the pid. */
const InfoSchema = z.object({
  open: z.boolean().describe("true: stop spending"),
  reason: z.enum(["none", "cost", "allowance", "unknown"]),
  message: z.string(),
  cost: z.object({ total: z.number(), currency: z.string(), days: z.record(z.string(), z.number()) }).nullable(),
  threshold: z.number(),
  allowances: z.array(z.object({ models: z.string(), used: z.number().nullable(), limit: z.number() })),
  asOf: z.string().nullable().describe("when the last good look at the account began"),
  ageSeconds: z.number().nullable(),
  error: z.string().nullable().describe("why the last look failed"),
  source: z.enum(["costs", "billing", "drill"]),
  version: z.string(),
  pid: z.number().int().positive(),
  startedAt: z.string(),
});

export type Info = z.output<typeof InfoSchema>;

const KeySchema = z.string().regex(/^[\x21-\x7e]+$/);

// ── Money and time ──────────────────────────────────────────────────────────────────────────────

/** The UTC days before, at and after `now`: yesterday, today and tomorrow. */
export function listDays(now: number): { yesterday: string; today: string; tomorrow: string } {
  return { yesterday: formatDay(now - DAY), today: formatDay(now), tomorrow: formatDay(now + DAY) };
}

/** `0.1 + 0.2` → `"0.3"`: what a person reads, never 0 for a cost. */
export function formatAmount(amount: number): string {
  return String(Number(amount.toPrecision(12)));
}

/** Whether a model's name fits `patterns`: `matchesModel("*-mini*,o?", "gpt-4o-mini-2024-07-18")` → true */
export function matchesModel(patterns: string, model: string): boolean {
  return patterns.split(",").some((pattern) => matchesGlob(pattern, model));
}

/** Goes back to the last star only, so that the time stays below the product of the lengths. */
function matchesGlob(glob: string, text: string): boolean {
  let [at, star, resume] = [0, -1, 0];
  for (let i = 0; i < text.length;) {
    if (glob[at] === "*") {
      star = at++;
      resume = i;
    } else if (glob[at] === "?" || glob[at] === text[i]) {
      at++;
      i++;
    } else if (star >= 0) {
      at = star + 1;
      i = ++resume;
    } else return false;
  }
  return /^\**$/.test(glob.slice(at));
}

/** `Retry-After` in seconds or as a date → ms from `now`, 0 for anything else, at most an hour. */
export function parseRetryAfter(header: string | null, now: number): number {
  const seconds = Number(header || Number.NaN);
  const ms = Number.isNaN(seconds) ? Date.parse(header ?? "") - now : seconds * SECOND;
  return Math.min(Math.max(ms || 0, 0), HOUR);
}

/** ms until the next look after `failures` failed ones in a row: 5 s (or the interval), doubling to 5 min. */
export function computeBackoff(failures: number, waits: Record<"intervalMs" | "retryAfterMs", number>): number {
  const first = Math.min(5 * SECOND, waits.intervalMs);
  return Math.max(Math.min(first * 2 ** (failures - 1), 5 * MINUTE), waits.retryAfterMs);
}

/**
 * Makes text from outside fit for a log line: without control characters, at most 300 characters,
 * and without the key, a part of it of 8 characters or more, or anything that looks like a key.
 */
export function redact(text: string, key: string): string {
  const line = text.slice(0, 2000).replace(/[\p{Cc}\p{Cf}\u2028\u2029]+/gu, " ");
  const shortest = Math.min(8, key.length);
  let clean = "";
  for (let i = 0; i < line.length;) {
    let length = 0;
    while (i + length < line.length && key.includes(line.slice(i, i + length + 1))) length++;
    if (length > 0 && length >= shortest) clean += "***";
    else clean += line.slice(i, i + (length = 1));
    i += length;
  }
  clean = clean.replace(/\bsk-[\w*.…-]*[\w*]/g, "sk-***");
  return clean.length > 300 ? `${clean.slice(0, 300)}…` : clean;
}

// ── The account's answers ───────────────────────────────────────────────────────────────────────
// Each item is read by itself: a cost that was seen counts also where its neighbour cannot be read.

type Row = z.output<typeof CostRowSchema> | z.output<typeof UsageRowSchema>;

/** A cost, or a use of tokens, of a bucket that begins on `day` (UTC). */
export type Entry = { day: string; lastDay: string } & Row;

/** What an answer holds: `next` is the cursor of the next page, `problem` why the look has failed. */
export type Page = { entries: Entry[]; next: string | null; problem: string | null };

function explain(error: z.ZodError): string {
  const [issue] = error.issues;
  return `${issue?.path.join(".") || "the answer"}: ${issue?.message}`;
}

/** The items that fit; what is wrong with the others, or with the list, goes to `problems`. */
function readEach<T>(items: unknown, { schema, problems }: { schema: z.ZodType<T>; problems: string[] }): T[] {
  const list = ListSchema.safeParse(items);
  if (!list.success) problems.push(`a list: ${explain(list.error)}`);
  return (list.data ?? []).flatMap((item) => {
    const read = schema.safeParse(item);
    if (!read.success) problems.push(explain(read.error));
    return read.success ? [read.data] : [];
  });
}

/** Reads a page of the Costs or the Usage API; a row counts for the UTC day of its bucket's start. */
export function readPage(body: unknown, rowSchema: z.ZodType<Row>): Page {
  const problems: string[] = [];
  const { data } = JsonSchema.safeParse(body).data ?? {};
  const entries = readEach(data, { schema: BucketSchema, problems }).flatMap(({ rows, ...span }) =>
    readEach(rows, { schema: rowSchema, problems }).map((row) => ({ ...span, ...row })),
  );
  const envelope = PageSchema.safeParse(body);
  if (!envelope.success) problems.push(explain(envelope.error));
  const next = envelope.data?.has_more ? envelope.data.next_page || null : null;
  if (envelope.data?.has_more && !next) problems.push("has_more without a next_page");
  return { entries, next, problem: problems[0] ?? null };
}

/**
 * Reads the answer of the billing endpoint, in fractional cents. What `total_usage` holds above the sum
 * of the days is booked on `today`: gateways send nothing else.
 */
export function readBilling(body: unknown, today: string): Page {
  const problems: string[] = [];
  const { daily_costs } = JsonSchema.safeParse(body).data ?? {};
  const currency = "usd";
  const entries = readEach(daily_costs ?? [], { schema: BillingDaySchema, problems }).flatMap(
    ({ line_items, ...span }) => {
      const items = readEach(line_items, { schema: BillingItemSchema, problems });
      return items.map(({ cost }) => ({ ...span, cost: cost / 100, currency }));
    },
  );
  const envelope = BillingSchema.safeParse(body);
  if (!envelope.success) problems.push(explain(envelope.error));
  const total = (envelope.data?.total_usage ?? 0) / 100;
  const rest = total - entries.reduce((sum, { cost }) => sum + cost, 0);
  // What is smaller than this is the rounding of the sum.
  if (rest > total * 1e-12) entries.push({ day: today, lastDay: today, cost: rest, currency });
  return { entries, next: null, problem: problems[0] ?? null };
}

// ── The decision ────────────────────────────────────────────────────────────────────────────────

type ByDay = Record<string, number>;

/** What is known of the account: by one look, or by all that came before. */
export interface Reading {
  /** When the last good look began (ms since 1970), null before there was one. */
  asOfMs: number | null;
  /** Cost by UTC day in `currency`; it is null before a cost was seen. */
  days: ByDay;
  currency: string | null;
  /** Tokens by UTC day, for each allowance. */
  tokens: ByDay[];
  /** Why the last look failed, null after a good one, and how long the account wants to be left alone. */
  error: string | null;
  retryAfterMs: number;
}

/**
 * A reading at `now` (ms since 1970), under the user's options; `elapsedMs` since the last good look began,
 * by a clock that nobody sets.
 */
export type Moment = { now: number; reading: Reading; options: Options; elapsedMs?: number };

/** Nothing seen yet. */
export const UNSEEN: Reading = { asOfMs: null, days: {}, currency: null, tokens: [], error: null, retryAfterMs: 0 };

/**
 * Books what an answer holds in `look` and returns what is wrong with it. A credit (an amount below 0)
 * never hides a cost; a model counts toward the first allowance that it matches.
 */
export function bookEntries(look: Reading, { entries, now, options }: Omit<Moment, "reading"> & { entries: Entry[] }) {
  const { yesterday, tomorrow } = listDays(now);
  let problem: string | null = null;
  for (const entry of entries.filter(({ lastDay }) => lastDay >= yesterday)) {
    const { day, lastDay } = entry;
    if (day < yesterday) {
      const isFree = "cost" in entry ? entry.cost <= 0 : entry.tokens === 0;
      if (!isFree) problem ??= `a bucket of ${day} reaches into ${lastDay}, its costs cannot be told apart`;
    } else if (day > tomorrow) {
      problem ??= `${day} lies in the future; check this machine's clock`;
    } else if ("tokens" in entry) {
      const tokens = look.tokens[options.allowances.findIndex(({ models }) => matchesModel(models, entry.model))];
      if (tokens) tokens[day] = (tokens[day] ?? 0) + entry.tokens;
    } else {
      look.days[day] = (look.days[day] ?? 0) + Math.max(entry.cost, 0);
      const mixed = look.currency !== null && look.currency !== entry.currency;
      if (mixed) problem ??= `${look.currency} and ${entry.currency} are mixed`;
      look.currency = joinCurrencies(look.currency, entry.currency);
    }
  }
  return problem;
}

/** The one that is not usd, where there is one: the threshold is in usd, and must not hold for others. */
function joinCurrencies(one: string | null, other: string | null): string | null {
  return [one, other].find((currency) => currency !== null && currency !== "usd") ?? one ?? other;
}

/** What was known and what was seen, day by day the larger: a cost that was seen is never taken back. */
export function raiseReading(reading: Reading, seen: Reading): Reading {
  const raise = (known: ByDay = {}, more: ByDay): ByDay => {
    const larger = Object.entries(more).map(([day, count]) => [day, Math.max(known[day] ?? 0, count)]);
    return { ...known, ...Object.fromEntries(larger) };
  };
  const tokens = seen.tokens.map((used, index) => raise(reading.tokens[index], used));
  const currency = joinCurrencies(reading.currency, seen.currency);
  return { ...reading, days: raise(reading.days, seen.days), currency, tokens };
}

/** A good look replaces the reading; a failed one can only raise it. */
export function mergeLook(reading: Reading, look: Reading): Reading {
  if (look.error === null) return look;
  return { ...raiseReading(reading, look), error: look.error, retryAfterMs: look.retryAfterMs };
}

/** The days from `first` on and their sum, null where none was seen; a clock that is behind hides no day. */
function sumSince(first: string, byDay: ByDay = {}): { total: number; days: ByDay } | null {
  const seen = Object.entries(byDay).filter(([day]) => day >= first);
  if (seen.length === 0) return null;
  return { total: seen.reduce((sum, [, count]) => sum + count, 0), days: Object.fromEntries(seen.sort()) };
}

/** What was seen of the window at `now`: yesterday and today, UTC. */
function sumWindow({ now, reading }: Moment): { total: number; days: ByDay } {
  return sumSince(listDays(now).yesterday, reading.days) ?? { total: 0, days: {} };
}

/** The allowances, and the tokens of today that count toward each; null where none was ever looked for. */
function listAllowances({ now, reading, options }: Moment): Info["allowances"] {
  const { today } = listDays(now);
  const none = reading.asOfMs === null ? null : 0;
  const use = (index: number) => sumSince(today, reading.tokens[index])?.total ?? none;
  return options.allowances.map(({ models, limit }, index) => ({ models, used: use(index), limit }));
}

export type Decision = Pick<Info, "open" | "reason" | "message">;

/** What a reading means at `now`. The order is the contract: a cost that was seen wins. */
export function decide(moment: Moment): Decision {
  const { now, reading, options, elapsedMs = 0 } = moment;
  const { yesterday, today } = listDays(now);
  const { asOfMs, currency, error } = reading;
  const { total, days } = sumWindow(moment);
  if (total > (currency === "usd" ? options.thresholdUsd : 0)) {
    const costs = Object.entries(days).filter(([, cost]) => cost > 0);
    const parts = costs.map(([day, cost]) => `${formatAmount(cost)} ${currency} on ${day}`);
    return { open: true, reason: "cost", message: `${parts.join(" and ")} (UTC)` };
  }
  const full = listAllowances(moment).find(({ used, limit }) => (used ?? 0) >= limit);
  if (full) {
    const message = `${full.used} of ${full.limit} tokens of ${full.models} used on ${today} (UTC)`;
    return { open: true, reason: "allowance", message };
  }
  const ageMs = asOfMs === null ? Infinity : Math.max(now - asOfMs, elapsedMs);
  const aheadMs = (asOfMs ?? now) - now;
  // A look from after midnight says nothing of the day before yesterday, should the clock go back.
  const isCovered = asOfMs !== null && listDays(asOfMs).yesterday <= yesterday;
  if (ageMs <= options.maxAgeMs && aheadMs <= options.maxAgeMs && isCovered) {
    const cost = total > 0 ? `${formatAmount(total)} ${currency}, within the threshold,` : "no cost";
    return { open: false, reason: "none", message: `${cost} on ${yesterday} and ${today} (UTC)` };
  }
  const past =
    ageMs > options.maxAgeMs
      ? `is ${Math.floor(ageMs / SECOND)} s old`
      : "lies in the future, check this machine's clock";
  const cause = asOfMs === null ? "no good look at the account yet" : `the last good look ${past}`;
  return { open: options.whenUnknown, reason: "unknown", message: error === null ? cause : `${cause}: ${error}` };
}

/** The INFO object of a reading at `now`, for a breaker that started at `startedMs`. */
export function describe({ startedMs, ...moment }: Moment & { startedMs: number }): Info {
  const { now, reading, options, elapsedMs = 0 } = moment;
  const { asOfMs, currency, error } = reading;
  const { total, days } = sumWindow(moment);
  const isSeen = Object.keys(reading.days).length > 0;
  return {
    ...decide(moment),
    cost: isSeen ? { total, currency: currency ?? "usd", days } : null,
    threshold: options.thresholdUsd,
    allowances: listAllowances(moment),
    asOf: asOfMs === null ? null : new Date(asOfMs).toISOString(),
    ageSeconds: asOfMs === null ? null : Math.floor(Math.max(now - asOfMs, elapsedMs, 0) / SECOND),
    error,
    source: resolveSource(options),
    version: VERSION,
    pid: process.pid,
    startedAt: new Date(startedMs).toISOString(),
  };
}

// ── The protocol ────────────────────────────────────────────────────────────────────────────────
// One connection, one question, answered by one row of this table.

/** What a reply may draw on. */
export type View = { decide: () => Decision; describe: () => Info };

export interface Question {
  name: string;
  help: string;
  reply: (view: View) => string;
  /** Asked by this machine only: it learns amounts. */
  localOnly?: true;
  /** The answer rests on a look, and waits for the first one. */
  needsLook?: true;
}

const STATUS_HELP = "TRUE when the account incurred a cost today or yesterday (UTC) or that is not known, else FALSE";
const INFO_HELP = "reason, amounts and age as a line of JSON, for this machine only";

/** A new command is a new row. */
export const QUESTIONS: Question[] = [
  { name: "STATUS", help: STATUS_HELP, needsLook: true, reply: (view) => (view.decide().open ? "TRUE" : "FALSE") },
  { name: "HELP", help: "this list", reply: () => HELP },
  { name: "INFO", help: INFO_HELP, needsLook: true, localOnly: true, reply: (view) => JSON.stringify(view.describe()) },
];

const HELP = [
  ...QUESTIONS.map(({ name, help }) => `${name.padEnd(6)} ${help}`),
  "{      begins a message of the Model Context Protocol, one a line, for this machine only",
].join("\n");

function refuseWith(text: string): Question {
  return { name: "ERR", help: "", reply: () => `ERR ${text}` };
}

const UNKNOWN = refuseWith("Unknown Command");
const NOT_ALLOWED = refuseWith("Not Allowed");
const TOO_LONG = refuseWith("Line Too Long");
const BUSY = refuseWith("Busy");

/** Finds what a line asks for: `findQuestion(" status\r", { isLocal: () => false })` → the row of STATUS */
export function findQuestion(line: string, { isLocal }: { isLocal: () => boolean }): Question {
  const [, word = ""] = /^[ \t\r]*([a-z]+)[ \t\r]*$/i.exec(line) ?? [];
  const question = QUESTIONS.find(({ name }) => name === word.toUpperCase()) ?? UNKNOWN;
  return question.localOnly && !isLocal() ? NOT_ALLOWED : question;
}

const MAX_LINE_BYTES = 256;
const MAX_MCP_LINE_BYTES = 64 * 1024;
const NOTHING: Buffer = Buffer.alloc(0);

type Cut = { line: string; rest: Buffer } | "incomplete" | "too long";

/** Cuts the first line off `input`; at the end of the input an unfinished one counts as a line. */
export function takeLine(input: Buffer, { ended, limit }: { ended: boolean; limit: number }): Cut {
  const newline = input.indexOf(10);
  const end = newline < 0 ? input.length : newline;
  if (end - (input[end - 1] === 13 ? 1 : 0) > limit) return "too long";
  if (newline < 0 && !ended) return "incomplete";
  const rest = end + 1 < input.length ? input.subarray(end + 1) : NOTHING;
  return { line: input.toString("utf8", 0, end), rest };
}

/** Whether the first byte that is not blank is a brace: the line is MCP. */
export function beginsMcp(input: Buffer): boolean {
  let at = 0;
  while (input[at] === 32 || input[at] === 9 || input[at] === 13) at++;
  return input[at] === 123;
}

// ── MCP ─────────────────────────────────────────────────────────────────────────────────────────
// The Model Context Protocol, without state: one message in, at most one out. A request is of the
// revision 2026-07-28 when its _meta names a protocol version; the older ones begin with a handshake.

const MODERN_VERSION = "2026-07-28";
const HANDSHAKE_VERSIONS = ["2025-11-25", "2025-06-18"];
const META = "io.modelcontextprotocol/";
const SERVER_INFO = { name: "breaker", title: "Cost circuit breaker", version: VERSION };
const INSTRUCTIONS =
  "Before spending tokens of an OpenAI account, and again every few minutes while doing so, call " +
  "breaker_status. If open is true, stop spending, tell the person why, and do not retry.";

const TOOL = "breaker_status";
const VERSION_KEY = `${META}protocolVersion`;
const CAPABILITIES_KEY = `${META}clientCapabilities`;

const IdSchema = z.union([z.string(), z.int()]);
const MessageSchema = z.object({ jsonrpc: z.literal("2.0"), method: z.string(), params: z.unknown().optional() });
const ParamsSchema = z.looseObject({ _meta: JsonSchema.optional() });
const MetaSchema = z.object({ [VERSION_KEY]: z.string(), [CAPABILITIES_KEY]: JsonSchema });
const CancelSchema = z.object({ requestId: IdSchema });

type Id = z.output<typeof IdSchema>;
type Json = Record<string, unknown>;

/** What becomes of a message; `ask` wants the INFO object before it can be answered. */
export type McpAnswer =
  | { kind: "none" }
  | { kind: "reply"; text: string }
  | { kind: "cancel"; id: Id }
  | { kind: "ask"; id: Id; finish: (info: Info) => string };

function describeTool(): Json {
  const { $schema: _, ...outputSchema } = z.toJSONSchema(InfoSchema.omit({ pid: true }));
  return {
    name: TOOL,
    title: "OpenAI cost breaker",
    description:
      "Tells whether this OpenAI account incurred a cost today or yesterday (UTC). Call it before work " +
      "that spends tokens, and every few minutes during it. If open is false, go on. If open is true, stop " +
      "spending at once, tell the person the message and do not retry: the person decides how to go on. " +
      "The reason unknown means that the costs cannot be read, which is no permission to spend.",
    inputSchema: { type: "object", additionalProperties: false },
    outputSchema,
    annotations: { readOnlyHint: true, openWorldHint: false },
  };
}

function formatStatus({ pid: _, ...status }: Info): Json {
  return { content: [{ type: "text", text: JSON.stringify(status) }], structuredContent: status };
}

function fail(id: Id | undefined, error: { code: number; message: string; data?: Json }) {
  return { kind: "reply" as const, text: JSON.stringify({ jsonrpc: "2.0", id, error }) };
}

/** Answers one line of MCP, bad ones too. */
export function answerMcp(line: string): McpAnswer {
  const json = parseJson(line);
  if (json === undefined) return fail(undefined, { code: -32700, message: "Not JSON" });
  const envelope = JsonSchema.safeParse(json).data ?? {};
  const id = IdSchema.safeParse(envelope["id"]).data;
  const message = MessageSchema.safeParse(json);
  if (!message.success) {
    if ("result" in envelope || "error" in envelope) return { kind: "none" };
    return fail(id, { code: -32600, message: "Not a request of JSON-RPC 2.0" });
  }
  const { method, params = {} } = message.data;
  if (!("id" in envelope)) {
    const cancelled = CancelSchema.safeParse(params);
    if (method !== "notifications/cancelled" || !cancelled.success) return { kind: "none" };
    return { kind: "cancel", id: cancelled.data.requestId };
  }
  if (id === undefined) return fail(id, { code: -32600, message: "id: expected a string or an integer" });
  const known = ParamsSchema.safeParse(params);
  if (!known.success) return fail(id, { code: -32602, message: explain(known.error) });
  const meta = known.data._meta ?? {};
  const modern = VERSION_KEY in meta || CAPABILITIES_KEY in meta;
  if (modern) {
    const requested = meta[VERSION_KEY];
    if (typeof requested === "string" && requested !== MODERN_VERSION) {
      const data = { supported: [MODERN_VERSION], requested };
      return fail(id, { code: -32022, message: "Unsupported protocol version", data });
    }
    const complete = MetaSchema.safeParse(meta);
    if (!complete.success) return fail(id, { code: -32602, message: `_meta.${explain(complete.error)}` });
  }
  return answerRequest(id, { method, params: known.data, modern });
}

function answerRequest(id: Id, call: { method: string; params: Json; modern: boolean }): McpAnswer {
  const { method, params, modern } = call;
  const invalid = (message: string) => fail(id, { code: -32602, message });
  const envelope = modern ? { resultType: "complete", _meta: { [`${META}serverInfo`]: SERVER_INFO } } : {};
  const cached = modern ? { ttlMs: HOUR, cacheScope: "public" } : {};
  const format = (result: Json) => JSON.stringify({ jsonrpc: "2.0", id, result: { ...result, ...envelope } });
  const succeed = (result: Json): McpAnswer => ({ kind: "reply", text: format(result) });
  const about = { capabilities: { tools: {} }, instructions: INSTRUCTIONS };
  switch (`${modern ? "modern" : "handshake"} ${method}`) {
    case "handshake initialize": {
      const version = z.string().safeParse(params["protocolVersion"]);
      if (!version.success) return invalid("protocolVersion: expected a string");
      const known = HANDSHAKE_VERSIONS.find((candidate) => candidate === version.data);
      return succeed({ protocolVersion: known ?? HANDSHAKE_VERSIONS[0], serverInfo: SERVER_INFO, ...about });
    }
    case "handshake ping":
      return succeed({});
    case "handshake server/discover":
      return invalid(`_meta: expected ${VERSION_KEY} and ${CAPABILITIES_KEY}`);
    case "modern server/discover":
      return succeed({ supportedVersions: [MODERN_VERSION], ...about, ...cached });
    case "modern subscriptions/listen": {
      if (!JsonSchema.safeParse(params["notifications"]).success) return invalid("notifications: expected an object");
      const acknowledged = { _meta: { [`${META}subscriptionId`]: id }, notifications: {} };
      const notification = { method: "notifications/subscriptions/acknowledged", params: acknowledged };
      return { kind: "reply", text: JSON.stringify({ jsonrpc: "2.0", ...notification }) };
    }
    case "modern tools/list":
    case "handshake tools/list":
      if (params["cursor"] !== undefined) return invalid("cursor: expected none, the list has one page");
      return succeed({ tools: [describeTool()], ...cached });
    case "modern tools/call":
    case "handshake tools/call":
      if (params["name"] !== TOOL) return invalid(`name: expected ${TOOL}, the only tool`);
      return { kind: "ask", id, finish: (info) => format(formatStatus(info)) };
    default:
      return fail(id, { code: -32601, message: "No such method" });
  }
}

// ── Effects: child processes and the key ────────────────────────────────────────────────────────

/** What the program has around it; a test brings its own. */
export interface Surroundings {
  env: Env;
  /** The wall clock, ms since 1970. */
  now: () => number;
  stdin: AsyncIterable<Uint8Array>;
  /** To stdout as it is, and to stderr as a line. */
  print: (text: string) => void;
  log: (text: string) => void;
  /** Whether stdout is a terminal that wants colours; to find out takes time. */
  isColoured: () => boolean;
}

/** What effects work with. */
export interface World extends Surroundings {
  options: Options;
  /** Aborts at the end: nothing that was started outlives it. */
  signal: AbortSignal;
}

/** How long a peer that makes no progress gets, a breaker that does not answer, and a command that was told to end. */
const PATIENCE_MS = 10 * SECOND;
const CHILD_OUTPUT_LENGTH = 64 * 1024;

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Waits as long as something holds, `limitMs` at most; false where it still holds then. */
async function waitWhile(holds: () => boolean, limitMs = Infinity): Promise<boolean> {
  const endMs = performance.now() + limitMs;
  while (holds()) {
    if (performance.now() > endMs) return false;
    await Bun.sleep(10);
  }
  return true;
}

/** The environment of a child: with `extra`, and without the key, by its name or by its value. */
function childEnv({ OPENAI_ADMIN_KEY, ...env }: Env, extra: Env = {}): Env {
  const key = OPENAI_ADMIN_KEY?.trim();
  return { ...Object.fromEntries(Object.entries(env).filter(([, value]) => !key || !value?.includes(key))), ...extra };
}

/** Sends a signal, to a whole group where `pid` is negative; false where it cannot be sent. */
function kill(pid: number, signal: NodeJS.Signals | 0): boolean {
  try {
    return process.kill(pid, signal);
  } catch {
    return false;
  }
}

/**
 * Runs a program in a process group of its own; gives what it printed (64 KiB of each) and its exit code,
 * null where the group was killed: after `limitMs`, or by `signal`. Throws where it cannot be started.
 */
export async function runProgram(
  argv: string[],
  { env, signal, input, limitMs = 30 * SECOND }: { env: Env; signal: AbortSignal; input?: string; limitMs?: number },
) {
  const stdin = input === undefined ? "ignore" : Buffer.from(input);
  const child = Bun.spawn(argv, { env, stdin, stdout: "pipe", stderr: "pipe", detached: true });
  const printed = { stdout: "", stderr: "" };
  const collect = async (name: keyof typeof printed) => {
    for await (const chunk of child[name].pipeThrough(new TextDecoderStream())) {
      if (printed[name].length < CHILD_OUTPUT_LENGTH) printed[name] += chunk;
    }
  };
  const killed = Promise.withResolvers<null>();
  const end = () => {
    kill(-child.pid, "SIGKILL");
    killed.resolve(null);
  };
  const limit = AbortSignal.any([signal, AbortSignal.timeout(limitMs)]);
  limit.addEventListener("abort", end);
  if (limit.aborted) end();
  const ended = Promise.all([child.exited, collect("stdout"), collect("stderr")]);
  const code = await Promise.race([ended.then(([exitCode]) => exitCode), killed.promise]);
  limit.removeEventListener("abort", end);
  return { code, ...printed };
}

/** The first line of `pass show -- ENTRY`; throws an Error that says what to do. */
async function readPass({ options: { passEntry: entry }, env, signal }: World): Promise<string> {
  const ran = await runProgram(["pass", "show", "--", entry], { env: childEnv(env), signal }).catch(() => null);
  if (!ran) throw new Error("pass cannot be started; install it, or set OPENAI_ADMIN_KEY");
  const { code, stdout, stderr } = ran;
  if (code === null) throw new Error(`pass took longer than 30 s; unlock it in a terminal with: pass show ${entry}`);
  if (code !== 0 && stderr.includes("is not in the password store")) {
    throw new Error(`pass has no entry ${entry}; store an admin key with: pass insert ${entry}`);
  }
  if (code !== 0 && /No secret key|decryption failed/i.test(stderr)) {
    throw new Error(`the gpg key is locked or missing; unlock it in a terminal with: pass show ${entry}`);
  }
  if (code !== 0) throw new Error(`pass ended with ${code}, ${redact(stderr, "")}`);
  const line = stdout.split("\n", 1)[0] ?? "";
  // Of a folder, pass prints the name and a tree.
  return line === entry ? "" : line;
}

/** The key: OPENAI_ADMIN_KEY, else from pass. */
export function createKeySource(world: World) {
  let known: Promise<string> | null = null;
  const fetchKey = async () => {
    const given = world.env["OPENAI_ADMIN_KEY"];
    const key = KeySchema.safeParse((given || (await readPass(world))).trim());
    if (key.success) return key.data;
    const place = given ? "OPENAI_ADMIN_KEY" : `the first line of ${world.options.passEntry} in pass`;
    throw new Error(`${place} does not look like a key; put an admin key there`);
  };
  return {
    /** The key, fetched when first needed; throws an Error that says what to do. */
    async read(): Promise<string> {
      const reading = (known ??= fetchKey());
      try {
        return await reading;
      } catch (error) {
        if (known === reading) known = null;
        throw new Error(`Cannot read the key: ${messageOf(error)}`);
      }
    },
    /** Lets the next read fetch it afresh. */
    forget() {
      known = null;
    },
  };
}

export type KeySource = ReturnType<typeof createKeySource>;

// ── Effects: the look ───────────────────────────────────────────────────────────────────────────

const MAX_BODY_BYTES = 1024 * 1024;
const MAX_PAGES = 20;
const MAX_CLOCK_SKEW_MS = 10 * MINUTE;
const KEYS_URL = "https://platform.openai.com/settings/organization/admin-keys";

/** A list to read, page by page; `path` has a query. */
type Endpoint = { what: string; path: string; read: (body: unknown) => Page };

/** The endpoints that a look at `now` asks. */
function listEndpoints(options: Options, now: number): Endpoint[] {
  const { yesterday, today, tomorrow } = listDays(now);
  if (resolveSource(options) === "billing") {
    const path = `/dashboard/billing/usage?start_date=${yesterday}&end_date=${tomorrow}`;
    return [{ what: "the billing usage", path, read: (body) => readBilling(body, today) }];
  }
  const daysFrom = (start: string) => `start_time=${Date.parse(start) / SECOND}&bucket_width=1d&limit=31`;
  const projects = options.projects.map((id) => `&project_ids%5B%5D=${encodeURIComponent(id)}`).join("");
  const costs = `/organization/costs?${daysFrom(yesterday)}${projects}`;
  const usage = `/organization/usage/completions?${daysFrom(today)}&group_by%5B%5D=model`;
  const endpoints: Endpoint[] = [
    { what: "the costs", path: costs, read: (body) => readPage(body, CostRowSchema) },
    { what: "the token usage", path: usage, read: (body) => readPage(body, UsageRowSchema) },
  ];
  return options.allowances.length > 0 ? endpoints : endpoints.slice(0, 1);
}

/** What to do about an answer with another status than 200. */
function advise(status: number, options: Options): string {
  if (status >= 300 && status < 400) return "; a redirect is not followed, set --base-url to where it leads";
  if (status === 404) return "; check --base-url and --source";
  if (status !== 401 && status !== 403) return "; the next look comes by itself";
  if (resolveSource(options) === "billing") return "; check the key; api.openai.com wants --source costs";
  const store = `run: pass insert ${options.passEntry} (or set OPENAI_ADMIN_KEY)`;
  return `; create an admin key with the scope api.usage.read at ${KEYS_URL} and ${store}`;
}

/** The body of a response, null when it is over 1 MiB, counted after decompression. */
async function readBody(response: Response): Promise<string | null> {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let text = "";
  let size = 0;
  for await (const chunk of response.body ?? []) {
    size += chunk.byteLength;
    if (size > MAX_BODY_BYTES) return null;
    text += decoder.decode(chunk, { stream: true });
  }
  return text + decoder.decode();
}

/** Looks at the account once; `onSeen` hears what was seen so far. Never throws: a failed look holds its `error`. */
export type LookAt = (onSeen: (look: Reading) => void) => Promise<Reading>;

/** Makes the look at the account that the options ask for, with the key of `key`. */
export function createLook({ options, now, signal }: World, key: KeySource): LookAt {
  const { baseUrl, timeoutMs } = options;

  /** The body of a good answer; throws an Error that says what is wrong, and what to do. */
  async function request(path: string, { secret, look }: { secret: string; look: Reading }): Promise<unknown> {
    const asked = fetch(`${baseUrl}${path}`, {
      headers: { authorization: `Bearer ${secret}`, accept: "application/json", "cache-control": "no-cache" },
      redirect: "manual",
      keepalive: false,
      verbose: false,
      tls: { rejectUnauthorized: true },
      signal: AbortSignal.any([signal, AbortSignal.timeout(timeoutMs)]),
    });
    const response = await asked.catch((error) => {
      throw new Error(`${messageOf(error)}; check the network and --base-url`);
    });
    const { status, headers } = response;
    if (status === 401 || status === 403) key.forget();
    look.retryAfterMs = Math.max(look.retryAfterMs, parseRetryAfter(headers.get("retry-after"), now()));
    const text = await readBody(response).catch((error) => (status === 200 ? Promise.reject(error) : ""));
    const body = parseJson(text ?? "");
    const { error } = JsonSchema.safeParse(body).data ?? {};
    const refusal = RefusalSchema.safeParse(body).data?.error ?? "no reason given";
    if (status !== 200) throw new Error(`HTTP ${status}, ${refusal}${advise(status, options)}`);
    if (text === null) throw new Error("the answer is over 1 MiB; check --base-url");
    const date = headers.get("date");
    if (date !== null && !(Math.abs(Date.parse(date) - now()) <= MAX_CLOCK_SKEW_MS)) {
      throw new Error(`the answer is dated ${date}; set this machine's clock`);
    }
    if (body === undefined) throw new Error("the answer is not JSON; check --base-url");
    if (error !== undefined && error !== null) throw new Error(`an error with HTTP 200, ${refusal}`);
    return body;
  }

  return async (onSeen) => {
    const beganMs = now();
    const { yesterday, today } = listDays(beganMs);
    const look: Reading = { ...UNSEEN, asOfMs: beganMs, days: {}, tokens: options.allowances.map(() => ({})) };
    let secret = "";

    /** Books every page of an endpoint. */
    async function readPages({ path, read }: Endpoint): Promise<void> {
      const cursors = new Set<string>();
      for (let query = ""; ;) {
        const page = read(await request(path + query, { secret, look }));
        const complaint = bookEntries(look, { entries: page.entries, now: beganMs, options });
        onSeen(look);
        const problem = page.problem ?? complaint;
        if (problem !== null) throw new Error(problem);
        if (page.next === null) return;
        if (cursors.has(page.next)) throw new Error("next_page repeats itself, the pages have no end");
        if (cursors.add(page.next).size === MAX_PAGES) throw new Error(`there are more than ${MAX_PAGES} pages`);
        query = `&page=${encodeURIComponent(page.next)}`;
      }
    }

    const note = (error: unknown, what: string) => (look.error ??= redact(what + messageOf(error), secret));
    try {
      secret = await key.read();
      const reads = listEndpoints(options, beganMs).map((endpoint) =>
        readPages(endpoint).catch((error) => note(error, `Cannot read ${endpoint.what}: `)),
      );
      await Promise.all(reads);
    } catch (error) {
      note(error, "");
    }
    if (look.error !== null) return look;
    // A good look is complete: a day without a row had no cost.
    const tokens = look.tokens.map((used) => ({ [today]: 0, ...used }));
    return { ...look, days: { [yesterday]: 0, [today]: 0, ...look.days }, tokens };
  };
}

// ── Effects: the watch ──────────────────────────────────────────────────────────────────────────
// One timer and one look at a time, whoever asks: every answer comes from the reading in memory.

/** A wall clock that moves this far between two ticks was asleep, or was set. */
const SLEEP_GAP_MS = 10 * SECOND;

/** What a watch looks with, and what hears INFO after each look and tick. */
type Looking = { look: LookAt; onAnswer: (info: Info) => void };

/** Looks again and again until the end; `onAnswer` hears INFO at every look and tick after the first look. */
export function startWatch({ options, now, signal }: World, { look, onAnswer }: Looking) {
  const startedMs = now();
  let reading = UNSEEN;
  let goodMs = performance.now();
  let lastTickMs = startedMs;
  let pause = Promise.withResolvers<void>();
  let settled = Promise.withResolvers<void>();
  /** Looks begun so far, and how many must begin before one settles the answers; null when one has. */
  let begun = 0;
  let awaited: number | null = 1;

  /** Makes something of the reading as of now, once for all who ask within the same millisecond. */
  function atNow<T>(make: (moment: Moment) => T): () => T {
    let made: { now: number; elapsedMs: number; reading: Reading; value: T } | null = null;
    return () => {
      const at = { now: now(), elapsedMs: Math.floor(performance.now() - goodMs), reading };
      if (made?.now !== at.now || made.elapsedMs !== at.elapsedMs || made.reading !== reading) {
        made = { ...at, value: make({ ...at, options }) };
      }
      return made.value;
    };
  }
  const describeNow = atNow((moment) => describe({ ...moment, startedMs }));

  async function keepLooking(): Promise<void> {
    for (let failures = 0; ;) {
      await pause.promise;
      if (signal.aborted) return;
      pause = Promise.withResolvers();
      const count = ++begun;
      const beganMs = performance.now();
      const found = await look((seen) => (reading = raiseReading(reading, seen)));
      if (signal.aborted) return;
      reading = mergeLook(reading, found);
      if (found.error === null) goodMs = beganMs;
      failures = found.error === null ? 0 : failures + 1;
      if (awaited !== null && count >= awaited) {
        awaited = null;
        settled.resolve();
      }
      if (awaited === null) onAnswer(describeNow());
      const delayMs = failures === 0 ? options.intervalMs : computeBackoff(failures, { ...options, ...found });
      const timer = setTimeout(pause.resolve, delayMs);
      void pause.promise.then(() => clearTimeout(timer));
    }
  }

  function noticeSleep(): void {
    const nowMs = now();
    if (Math.abs(nowMs - lastTickMs) <= SLEEP_GAP_MS) return;
    lastTickMs = nowMs;
    if (awaited === null) settled = Promise.withResolvers();
    awaited = begun + 1;
    pause.resolve();
  }

  signal.addEventListener("abort", () => {
    pause.resolve();
    settled.resolve();
  });
  void keepLooking();
  return {
    decide: atNow(decide),
    describe: describeNow,
    /** Looks now, or once more where a look is under way; the first call starts the watch. */
    hurry: () => pause.resolve(),
    /** To be called every second: age and midnight change the answer without a look. */
    tick(): void {
      noticeSleep();
      lastTickMs = now();
      if (awaited === null) onAnswer(describeNow());
    },
    /** Resolves when the answers rest on a look, after `--timeout` at the latest; null when they do already. */
    settled(): Promise<void> | null {
      noticeSleep();
      if (awaited === null || signal.aborted) return null;
      return Promise.race([settled.promise, Bun.sleep(options.timeoutMs)]);
    },
  };
}

export type Watch = ReturnType<typeof startWatch>;

// ── Effects: the server ─────────────────────────────────────────────────────────────────────────

const MAX_CONNECTIONS = 1024;
const MAX_ASKED = 128;
const MAX_OUTBOX_LENGTH = 64 * 1024;

/** A conversation in MCP: `ask` brings the INFO object, `send` takes an answer without its newline. */
function createMcp({ ask, send }: { ask: () => Info | Promise<Info>; send: (text: string) => void }) {
  /** Requests that wait for INFO; one that is cancelled gets no answer. */
  const asked = new Set<Id>();
  function hear(line: string): void {
    const answer = line.trim() ? answerMcp(line) : { kind: "none" as const };
    switch (answer.kind) {
      case "none":
        return;
      case "reply":
        return send(answer.text);
      case "cancel":
        return void asked.delete(answer.id);
      case "ask": {
        const { id, finish } = answer;
        const reply = (info: Info) => {
          if (asked.delete(id)) send(finish(info));
        };
        asked.add(id);
        const info = ask();
        if (info instanceof Promise) info.then(reply).catch(() => asked.clear());
        else reply(info);
      }
    }
  }
  return { asked, hear };
}

interface Peer {
  /** What comes next: the question, its answer, the end of the answer, messages of MCP, or nothing. */
  phase: "asking" | "waiting" | "answered" | "mcp" | "closed";
  /** Whether the client has closed its half. */
  ended: boolean;
  input: Buffer;
  /** Answers to come, and the bytes of earlier ones that the socket has not taken yet. */
  outbox: string;
  unsent: Buffer;
  /** When to cut the connection off, ms on the monotonic clock. */
  deadlineMs: number;
  mcp: ReturnType<typeof createMcp> | null;
}

/** Answers questions over TCP. Throws an Error where it cannot listen. */
export function startServer({ options: { host, port } }: World, watch: Watch) {
  const peers = new Set<Bun.Socket<Peer>>();
  let pumping = false;

  /** Answers the one question of a connection, now or once the answer rests on a look. */
  function answer(socket: Bun.Socket<Peer>, question: Question): void {
    const peer = socket.data;
    const later = question.needsLook ? watch.settled() : null;
    const reply = () => {
      peer.phase = "answered";
      peer.outbox += `${question.reply(watch)}\n`;
    };
    peer.input = NOTHING;
    if (!later) return reply();
    peer.phase = "waiting";
    peer.deadlineMs = Infinity;
    void later.then(() => {
      if (peer.phase !== "waiting") return;
      reply();
      pump(socket);
    });
  }

  /** Takes one line from the input and sees to it; false where there is none to take now. */
  function readLine(socket: Bun.Socket<Peer>): boolean {
    const peer = socket.data;
    const { phase, input, ended } = peer;
    if (phase !== "asking" && phase !== "mcp") return false;
    if (input.length === 0 && (phase === "mcp" || !ended)) return false;
    if (peer.outbox.length > MAX_OUTBOX_LENGTH || (peer.mcp?.asked.size ?? 0) >= MAX_ASKED) return false;
    // This machine is on loopback, or at the very address that it connected to.
    const isLocal = () => isLoopback(socket.remoteAddress) || socket.remoteAddress === socket.localAddress;
    const braced = phase === "mcp" || beginsMcp(input);
    const cut = takeLine(input, { ended, limit: braced ? MAX_MCP_LINE_BYTES : MAX_LINE_BYTES });
    if (braced && !peer.mcp && !isLocal()) answer(socket, NOT_ALLOWED);
    else if (cut === "too long") answer(socket, TOO_LONG);
    else if (cut === "incomplete") return false;
    else if (!braced) answer(socket, findQuestion(cut.line, { isLocal }));
    else {
      peer.phase = "mcp";
      peer.mcp ??= createMcp({
        ask: () => watch.settled()?.then(watch.describe) ?? watch.describe(),
        send(text) {
          peer.outbox += `${text}\n`;
          if (!pumping) pump(socket);
        },
      });
      peer.input = cut.rest;
      peer.mcp.hear(cut.line);
    }
    return true;
  }

  /** Hands the socket what it takes; true where it took all of something. */
  function flush(socket: Bun.Socket<Peer>): boolean {
    const peer = socket.data;
    if (peer.unsent.length === 0 && peer.outbox === "") return false;
    if (peer.unsent.length === 0) {
      peer.unsent = Buffer.from(peer.outbox);
      peer.outbox = "";
    }
    const taken = Math.max(socket.write(peer.unsent), 0);
    if (taken > 0 || peer.deadlineMs === Infinity) peer.deadlineMs = performance.now() + PATIENCE_MS;
    peer.unsent = peer.unsent.subarray(taken);
    return peer.unsent.length === 0;
  }

  /** Does all that can be done for a peer now. */
  function pump(socket: Bun.Socket<Peer>): void {
    const peer = socket.data;
    if (peer.phase === "closed") return;
    pumping = true;
    do while (readLine(socket));
    while (flush(socket));
    pumping = false;
    const stuck = peer.unsent.length > 0;
    const finished = peer.phase === "answered" || (peer.ended && peer.mcp?.asked.size === 0);
    if (!stuck && finished) {
      peer.phase = "closed";
      peer.deadlineMs = performance.now() + PATIENCE_MS;
      socket.shutdown();
    } else if (peer.phase === "mcp") {
      if (!stuck) peer.deadlineMs = Infinity;
      if (stuck || peer.input.length > MAX_MCP_LINE_BYTES) socket.pause();
      else socket.resume();
    }
  }

  const listener = Bun.listen<Peer>({
    hostname: host,
    port,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        const deadlineMs = performance.now() + PATIENCE_MS;
        const buffers = { input: NOTHING, outbox: "", unsent: NOTHING };
        socket.data = { phase: "asking", ended: false, ...buffers, deadlineMs, mcp: null };
        peers.add(socket);
        if (peers.size > 2 * MAX_CONNECTIONS) socket.terminate();
        else if (peers.size > MAX_CONNECTIONS) {
          answer(socket, BUSY);
          pump(socket);
        }
      },
      data(socket, chunk) {
        const peer = socket.data;
        if (peer.phase !== "asking" && peer.phase !== "mcp") return;
        peer.input = peer.input.length > 0 ? Buffer.concat([peer.input, chunk]) : chunk;
        pump(socket);
      },
      end(socket) {
        socket.data.ended = true;
        if (socket.data.phase === "closed") socket.end();
        else pump(socket);
      },
      drain: pump,
      close(socket) {
        socket.data.phase = "closed";
        peers.delete(socket);
      },
      error() {}, // The peer is gone, which close has said already.
    },
  });

  return {
    port: listener.port,
    /** To be called every second: cuts off peers whose time is up. */
    tick(): void {
      const nowMs = performance.now();
      for (const socket of peers) if (nowMs >= socket.data.deadlineMs) socket.terminate();
    },
    /** Listens no more, lets answers under way arrive for up to a second, then closes everything. */
    async stop(): Promise<void> {
      listener.stop();
      const isIdle = ({ phase, mcp }: Peer) => phase === "asking" || (phase === "mcp" && mcp?.asked.size === 0);
      for (const socket of peers) if (isIdle(socket.data)) socket.terminate();
      await waitWhile(() => peers.size > 0, SECOND);
      listener.stop(true);
    },
  };
}

// ── Effects: hooks ──────────────────────────────────────────────────────────────────────────────

/** Makes the function that runs the hook for a change of the answer: one at a time, in order. */
function createHooks({ options, env, signal, log }: World): (info: Info) => void {
  let wasOpen = false;
  let queue = Promise.resolve();

  async function runHook(name: string, { command, info }: { command: string; info: Info }): Promise<void> {
    const variables = {
      BREAKER_OPEN: info.open ? "TRUE" : "FALSE",
      BREAKER_REASON: info.reason,
      BREAKER_MESSAGE: info.message,
      BREAKER_COST: String(info.cost?.total ?? ""),
    };
    const input = `${JSON.stringify(info)}\n`;
    const ran = await runProgram(["sh", "-c", command], { env: childEnv(env, variables), signal, input });
    const lines = `${ran.stdout}\n${ran.stderr}`.split("\n").filter((line) => line.trim());
    for (const line of lines) log(`${name}: ${redact(line, "")}`);
    if (ran.code !== 0) log(`${name}: ${ran.code === null ? "killed" : `ended with exit code ${ran.code}`}`);
  }

  return (info) => {
    if (info.open === wasOpen) return;
    wasOpen = info.open;
    const [name, command] = info.open ? ["--on-trip", options.onTrip] : ["--on-reset", options.onReset];
    if (!command) return;
    queue = queue.then(() => runHook(name, { command, info })).catch((error) => log(`${name}: ${messageOf(error)}`));
  };
}

// ── Effects: asking a running breaker ───────────────────────────────────────────────────────────

/** A TCP address, and how long to wait for an answer from it. */
type Address = Pick<Options, "host" | "port" | "timeoutMs">;

/** Asks one question; throws an Error that says what to do where nothing answers. */
export async function ask(question: string, { host, port, timeoutMs }: Address): Promise<string> {
  const hostname = host === "0.0.0.0" ? "127.0.0.1" : host === "::" ? "::1" : host;
  const answered = Promise.withResolvers<void>();
  const decoder = new TextDecoder();
  let text = "";
  const refuse = (cause: string) =>
    answered.reject(new Error(`No breaker answers at ${hostname}:${port}, ${cause}; start one with: bun breaker.ts`));
  const timer = setTimeout(refuse, timeoutMs, `nothing came within ${Math.floor(timeoutMs / SECOND)} s`);
  const connecting = Bun.connect({
    hostname,
    port,
    socket: {
      open: (socket) => void socket.write(`${question}\n`),
      data(socket, chunk) {
        text += decoder.decode(chunk, { stream: true });
        if (text.length > MAX_BODY_BYTES) socket.terminate();
      },
      close: () => (text.endsWith("\n") ? answered.resolve() : refuse("the connection closed without an answer")),
      error: (_, error) => refuse(error.message),
    },
  });
  connecting.catch((error) => refuse(messageOf(error)));
  try {
    await answered.promise;
    return text.trimEnd();
  } finally {
    clearTimeout(timer);
    connecting.then((socket) => socket.terminate()).catch(() => {});
  }
}

/** Whether the breaker at `address` is open; throws where it does not say TRUE or FALSE. */
async function askStatus(address: Address): Promise<boolean> {
  const text = await ask("STATUS", address);
  if (text === "TRUE" || text === "FALSE") return text === "TRUE";
  throw new Error(`What listens at port ${address.port} answers "${redact(text, "")}"; expected TRUE or FALSE`);
}

/** What the breaker at `address` knows; throws where that is none, or does not take this machine for its own. */
async function askInfo(address: Address): Promise<Info> {
  const text = await ask("INFO", address);
  const info = InfoSchema.safeParse(parseJson(text));
  if (info.success) return info.data;
  throw new Error(`What listens at port ${address.port} answers "${redact(text, "")}"; expected INFO of a breaker`);
}

// ── Effects: stop and exec ──────────────────────────────────────────────────────────────────────

interface Process {
  pid: number;
  parent: number;
  /** Tells a process from a later one with the same pid. */
  started: string;
  /** Whether its group is the one that the terminal sends a SIGINT to. */
  foreground: boolean;
  words: string[];
}

/** The processes that run on this machine, without those that have ended and wait for their parents. */
function listProcesses(): Process[] {
  if (existsSync("/proc/self/stat")) return readdirSync("/proc").flatMap(readProcess);
  return parsePs(
    Bun.spawnSync(["ps", "-A", "-o", "pid=,ppid=,stat=,lstart=,args="], {
      env: { PATH: "/usr/bin:/bin" },
    }).stdout.toString(),
  );
}

/** Reads the lines of `ps`: `"7 1 S+ Mon Nov 23 11:04:57 2026 bun breaker.ts"` → `[{ pid: 7, parent: 1, … }]` */
export function parsePs(text: string): Process[] {
  const form = /^ *(\d+) +(\d+) +([^Z ]\S*) +((?:\S+ +){4}\S+) (.*)$/gm;
  return [...text.matchAll(form)].map(([, pid, parent, state = "", started = "", args = ""]) => {
    const words = args.trim().split(/ +/);
    return { pid: Number(pid), parent: Number(parent), started, foreground: state.includes("+"), words };
  });
}

/** One process from /proc; none where it has just ended. */
function readProcess(name: string): Process[] {
  try {
    const pid = z.coerce.number().parse(name);
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    const [state, parent, group, , , terminalGroup, ...fields] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    const words = readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").slice(0, -1);
    const foreground = group === terminalGroup;
    return state === "Z" ? [] : [{ pid, parent: Number(parent), started: fields[13] ?? "", foreground, words }];
  } catch {
    return [];
  }
}

/** Whether `pid` serves with this script, run by Bun or compiled: nothing else is ever stopped. */
function isServing(pid: number): boolean {
  const isThis = (path = "") => basename(path).replace(/\.\w+$/, "") === basename(import.meta.path, ".ts");
  const { words = [] } = listProcesses().find((process) => process.pid === pid) ?? {};
  const isBun = basename(words[0] ?? "").startsWith("bun");
  const script = isBun ? words.findIndex((text, at) => at > 0 && text !== "run" && !text.startsWith("-")) : 0;
  if (!isThis(words[script])) return false;
  try {
    return parseArguments(words.slice(script + 1), {}).command === "serve";
  } catch {
    return true; // Its own environment made its options valid.
  }
}

/** Ends the breaker that answers at `address`, and waits until it is gone; throws where that cannot be. */
async function stopBreaker(address: Address): Promise<number> {
  const { pid } = await askInfo(address);
  if (!isServing(pid))
    throw new Error(
      `Process ${pid} is no breaker that runs here as bun breaker.ts; stop it where it runs, or with: kill`,
    );
  if (!kill(pid, "SIGTERM")) throw new Error(`Process ${pid} cannot be stopped; try it as the user who started it`);
  if (await waitWhile(() => isServing(pid), address.timeoutMs)) return EXIT.closed;
  throw new Error(`Process ${pid} does not stop; end it with: kill -9 ${pid}`);
}

/** Whether a process carries `mark` in the environment that it began with; only /proc tells. */
function isMarked(pid: number, mark: string): boolean {
  try {
    return readFileSync(`/proc/${pid}/environ`, "utf8").includes(mark);
  } catch {
    return false;
  }
}

/** The members of `family` that still run, all that carry its mark, and all that descend from these. */
function updateFamily(family: Process[], mark: string): Process[] {
  const running = listProcesses();
  const isKnown = (one: Process) => family.some(({ pid, started }) => pid === one.pid && started === one.started);
  let members = running.filter((one) => isKnown(one) || isMarked(one.pid, mark));
  for (let before = 0; before < members.length;) {
    before = members.length;
    members = running.filter((one) => members.some(({ pid }) => pid === one.pid || pid === one.parent));
  }
  return members;
}

/** Whether the terminal, if there is one, sends its signals to this process: it then does so to the whole group. */
function isForeground(): boolean {
  return listProcesses().some(({ pid, foreground }) => foreground && pid === process.pid);
}

/**
 * Runs a command as long as the breaker is closed; gives its exit code, 75 where the breaker refused or
 * stopped it. Throws where no breaker answers at the start.
 */
async function guard(argv: string[], { options, env, log }: World): Promise<number> {
  const address: Address = { ...options, timeoutMs: PATIENCE_MS };
  const giveReason = async () =>
    (await askInfo({ ...address, timeoutMs: SECOND }).catch(() => null))?.message ?? "TRUE";
  if (await askStatus(address)) {
    log(`the breaker is open, ${argv[0]} was not started: ${await giveReason()}`);
    return EXIT.stopped;
  }
  let child: Bun.Subprocess;
  const signals: NodeJS.Signals[] = ["SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"];
  const passOn = (signal: NodeJS.Signals) => {
    const isTyped = (signal === "SIGINT" || signal === "SIGQUIT") && isForeground();
    if (!isTyped) child.kill(signal);
  };
  const mark = crypto.randomUUID();
  for (const signal of signals) process.on(signal, passOn); // First of all: no signal may miss the child.
  try {
    const extra = { BREAKER_EXEC: `${env["BREAKER_EXEC"] ?? ""} ${mark}`.trim() }; // After that of an exec around it.
    child = Bun.spawn(argv, { env: childEnv(env, extra), stdio: ["inherit", "inherit", "inherit"] });
  } catch (error) {
    log(`cannot run ${argv[0]}: ${messageOf(error)}`);
    for (const signal of signals) process.off(signal, passOn);
    return z.object({ code: z.literal("ENOENT") }).safeParse(error).success ? EXIT.notFound : EXIT.notExecutable;
  }
  let family = listProcesses().filter(({ pid }) => pid === child.pid);

  /** Gives the reason once the breaker is open, or unknown for too long; null where the command ended before. */
  async function watchBreaker(): Promise<string | null> {
    for (let failingSinceMs = Infinity; ;) {
      await Bun.sleep(SECOND);
      if (child.exitCode !== null || child.signalCode !== null) return null;
      family = updateFamily(family, mark);
      const askedMs = performance.now();
      try {
        if (await askStatus(address)) return await giveReason();
        failingSinceMs = Infinity;
      } catch (error) {
        failingSinceMs = Math.min(failingSinceMs, askedMs);
        const unanswered = performance.now() - failingSinceMs >= PATIENCE_MS;
        if (unanswered && options.whenUnknown) return messageOf(error);
      }
    }
  }

  try {
    const reason = await Promise.race([child.exited.then(() => null), watchBreaker()]);
    if (reason === null) return await child.exited;
    log(`the breaker is open, stopping ${argv[0]}: ${reason}`);
    const signalFamily = (signal: NodeJS.Signals | 0) => {
      family = updateFamily(family, mark);
      for (const { pid } of family) kill(pid, signal);
      return family.length > 0;
    };
    signalFamily("SIGTERM");
    await waitWhile(() => signalFamily(0), PATIENCE_MS);
    await waitWhile(() => signalFamily("SIGKILL"), PATIENCE_MS);
    await child.exited;
    return EXIT.stopped;
  } finally {
    for (const signal of signals) process.off(signal, passOn);
  }
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

/** Serves a simulated account on loopback that costs one cent after 10 s; gives its base URL. */
function startDrill({ now, signal }: { now: () => number; signal: AbortSignal }): string {
  const startedMs = now();
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    fetch({ url }) {
      const value = now() - startedMs >= 10 * SECOND ? "0.0100000000000000" : "0E-6176";
      const cost = { amount: { value, currency: "usd" } };
      const usage = { input_tokens: 90, output_tokens: 30, model: "drill" };
      const start_time = Date.parse(listDays(now()).today) / SECOND;
      const bucket = { object: "bucket", start_time, results: [url.includes("/usage/") ? usage : cost] };
      return Response.json({ object: "page", data: [bucket], has_more: false, next_page: null });
    },
  });
  signal.addEventListener("abort", () => void server.stop(true));
  return `http://127.0.0.1:${server.port}/v1`;
}

/** The key and the look that the options ask for; a drill looks at an account of its own. */
function prepareLook(world: World): { key: KeySource; look: LookAt } {
  const { drill, baseUrl } = world.options;
  const options = { ...world.options, baseUrl: drill ? startDrill(world) : baseUrl };
  const key: KeySource = drill ? { read: async () => "drill", forget() {} } : createKeySource(world);
  if (options.baseUrl.startsWith("http:")) {
    // Bun would send even a request to loopback through HTTP_PROXY, and the key with it.
    const direct = [process.env["NO_PROXY"] || process.env["no_proxy"], new URL(options.baseUrl).hostname, "::1"];
    process.env["NO_PROXY"] = process.env["no_proxy"] = direct.filter(Boolean).join(",");
  }
  return { key, look: createLook({ ...world, options }, key) };
}

/** The command `serve`. */
async function serve(world: World): Promise<number> {
  const { options, now, signal } = world;
  const log = (text: string) => world.log(`${new Date(now()).toISOString()} ${text}`);
  const { key, look } = prepareLook(world);
  const runHooks = createHooks({ ...world, log });
  let last: Info | null = null;
  const onAnswer = (info: Info) => {
    runHooks(info);
    if (info.error !== (last?.error ?? null)) log(info.error ?? "the account can be read again");
    if (info.open !== last?.open) log(`${info.open ? "TRUE" : "FALSE"}, ${info.message}`);
    last = info;
  };
  const watch = startWatch(world, { look, onAnswer });
  let server: ReturnType<typeof startServer>;
  try {
    server = startServer(world, watch);
  } catch (error) {
    const action = `Cannot listen at ${options.host}:${options.port}`;
    throw new Error(`${action}: ${messageOf(error)}; choose another --port, or stop what listens there`);
  }
  const refresh = () => {
    key.forget();
    watch.hurry();
  };
  process.on("SIGHUP", refresh);
  log(`breaker ${VERSION} listens on ${options.host}:${server.port}, looks at ${resolveSource(options)}`);
  if (options.maxAgeMs < options.intervalMs) log("--max-age is below --interval: between looks the state is unknown");
  const ticker = setInterval(() => {
    watch.tick();
    server.tick();
  }, SECOND);
  watch.hurry();
  await new Promise((resolve) => signal.addEventListener("abort", resolve));
  log("stopping");
  clearInterval(ticker);
  await server.stop();
  process.off("SIGHUP", refresh);
  return EXIT.closed;
}

/** What `check` prints for a person: the days, the allowances, and the verdict. */
export function formatCheck(info: Info, { now, coloured }: { now: number; coloured: boolean }): string {
  const { yesterday, today } = listDays(now);
  const rows = [yesterday, today].map((day): [string, string] => {
    const cost = info.cost?.days[day];
    return [day, cost === undefined ? "unknown" : `${formatAmount(cost)} ${info.cost?.currency}`];
  });
  for (const { models, used, limit } of info.allowances) rows.push([models, `${used ?? "unknown"} of ${limit} tokens`]);
  const width = Math.max(...rows.map(([name]) => name.length));
  const table = rows.map(([name, value]) => `${name.padEnd(width)}  ${value}\n`).join("");
  const verdict = { none: "closed", cost: "open", allowance: "open", unknown: "unknown" }[info.reason];
  const colour = { none: 32, cost: 31, allowance: 31, unknown: 33 }[info.reason];
  const age = info.asOf === null ? "" : `${info.source}, ${info.ageSeconds} s ago\n`;
  return `${table}${coloured ? `\x1b[1;${colour}m${verdict}\x1b[0m` : verdict}: ${info.message}\n${age}`;
}

/** The command `check`. */
async function check(world: World): Promise<number> {
  const { options, now, signal, print, isColoured } = world;
  const startedMs = now();
  const reading = mergeLook(UNSEEN, await prepareLook(world).look(() => {}));
  if (signal.aborted) throw new Error("The check was interrupted");
  const moment = { now: now(), reading, options, startedMs };
  const info = describe(moment);
  print(options.json ? `${JSON.stringify(info)}\n` : formatCheck(info, { now: moment.now, coloured: isColoured() }));
  if (info.reason === "unknown") return EXIT.unavailable;
  return info.open ? EXIT.open : EXIT.closed;
}

/** MCP on stdin and stdout until the end of input; each call asks the running breaker. */
async function speakMcp({ options, now, stdin, print }: World, address: Address): Promise<number> {
  const startedMs = now();
  const explainNone = (error: unknown): Info => {
    const unknown = describe({ now: now(), reading: UNSEEN, options, startedMs });
    return { ...unknown, open: true, message: messageOf(error), error: messageOf(error) };
  };
  const send = (text: string) => print(`${text}\n`);
  const mcp = createMcp({ ask: () => askInfo(address).catch(explainNone), send });
  let input = NOTHING;
  for await (const chunk of stdin) {
    input = Buffer.concat([input, chunk]);
    for (let cut; (cut = takeLine(input, { ended: false, limit: MAX_MCP_LINE_BYTES })) !== "incomplete";) {
      if (cut === "too long") {
        await waitWhile(() => mcp.asked.size > 0);
        send(fail(undefined, { code: -32600, message: "Line Too Long" }).text);
        return EXIT.closed;
      }
      input = cut.rest;
      mcp.hear(cut.line);
      await waitWhile(() => mcp.asked.size > MAX_ASKED);
    }
  }
  mcp.hear(input.toString());
  await waitWhile(() => mcp.asked.size > 0);
  return EXIT.closed;
}

/** The signals that end a command in good order. */
const ENDINGS: Record<"serve" | "check", NodeJS.Signals[]> = {
  serve: ["SIGTERM", "SIGINT", "SIGQUIT"],
  check: ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"],
};

/** Runs a command line and gives its exit code; never throws. */
export async function main(argv: string[], surroundings: Surroundings): Promise<number> {
  const stop = new AbortController();
  const quit = () => stop.abort();
  try {
    const call = parseArguments(argv, surroundings.env);
    if (call.command === "print") {
      surroundings.print(call.text);
      return EXIT.closed;
    }
    const { command, options, rest } = call;
    const world: World = { ...surroundings, options, signal: stop.signal };
    // A breaker answers after its own --timeout at the latest.
    const address: Address = { ...options, timeoutMs: options.timeoutMs + 2 * SECOND };
    if (command === "serve" || command === "check") ENDINGS[command].forEach((name) => process.on(name, quit));
    switch (command) {
      case "serve":
        return await serve(world);
      case "check":
        return await check(world);
      case "status": {
        const open = await askStatus(address);
        world.print(open ? "TRUE\n" : "FALSE\n");
        return open ? EXIT.open : EXIT.closed;
      }
      case "stop":
        return await stopBreaker(address);
      case "exec":
        return await guard(rest, world);
      case "mcp":
        return await speakMcp(world, address);
    }
  } catch (error) {
    surroundings.log(`breaker: ${redact(messageOf(error), "")}`);
    return error instanceof UsageError ? EXIT.usage : EXIT.unavailable;
  } finally {
    ENDINGS.check.forEach((name) => process.off(name, quit));
    stop.abort();
  }
}

/** Writes all of a text, also to a pipe that is full for a while. */
function writeAll(file: number, text: string): void {
  for (let rest = Buffer.from(text); rest.length > 0;) {
    try {
      rest = rest.subarray(writeSync(file, rest));
    } catch (error) {
      if (!z.object({ code: z.literal("EAGAIN") }).safeParse(error).success) throw error;
      Bun.sleepSync(1);
    }
  }
}

const MAX_LOG_LINES = 1000;

/** Writes lines to `file` in their order and never waits for them: the disk may be full, the reader asleep. */
export function createLog(file: number) {
  let written = Promise.resolve();
  let waiting = 0;
  return {
    log(text: string): void {
      if (waiting >= MAX_LOG_LINES) return;
      waiting++;
      written = written.then(() => new Promise((resolve) => write(file, `${text}\n`, () => resolve())));
      void written.then(() => waiting--);
    },
    /** Resolves when all is written, after a second at the latest. */
    flush: () => Promise.race([written, Bun.sleep(SECOND)]),
  };
}

if (import.meta.main) {
  const { log, flush } = createLog(2);
  const code = await main(Bun.argv.slice(2), {
    env: { ...process.env },
    now: Date.now,
    stdin: Bun.stdin.stream(),
    print: (text) => writeAll(1, text),
    log,
    isColoured: () => process.stdout.isTTY && !process.env["NO_COLOR"],
  });
  await flush();
  process.exit(code);
}
