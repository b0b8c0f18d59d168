#!/usr/bin/env -S bun -i --no-env-file
// SPDX-License-Identifier: MIT
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
 * Its documentation is the README.md of the project "breaker".
 *
 * @module
 */
import { basename } from "node:path";
import { isatty } from "node:tty";
import { parseArgs } from "node:util";
import { z } from "zod@4.6.7";

export const VERSION = "1.1.0";

const EXIT = { closed: 0, open: 1, usage: 64, unavailable: 69, stopped: 75, notExecutable: 126, notFound: 127 };

// ── Options ─────────────────────────────────────────────────────────────────────────────────────
// One table drives the flags, the BREAKER_* variables, the defaults, the validation and --help.

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

const UNITS = new Map(Object.entries({ ms: 1, s: SECOND, m: MINUTE, h: HOUR, "": 1, k: 1e3, M: 1e6, G: 1e9 }));

/** A number with a unit, as the number: `"10m"` → 600000, `"1.5M"` → 1500000. */
function scaled(form: RegExp, { min = 0, max = Infinity } = {}) {
  const scale = (text: string) => Number.parseFloat(text) * (UNITS.get(text.replace(/^[\d.]+/, "")) ?? NaN);
  return z.string().regex(form).transform(scale).pipe(z.number().min(min).max(max));
}

/** Whether an address, also an IPv4 one written as IPv6, is this machine's loopback. */
export function isLoopback(host: string): boolean {
  return /^((::ffff:)?127(\.\d{1,3}){3}|\[?::1\]?)$/.test(host);
}

/** By its name, localhost may lead to `::1`, where another user of this machine may listen. */
function resolveLocalhost(host: string): string {
  return host.toLowerCase() === "localhost" ? "127.0.0.1" : host;
}

const word = z.string().regex(/^[^\s\p{Cc}]+$/u);
const line = z.string().regex(/^\P{Cc}*$/u);

/** `"*-mini*,*-nano*=10M"` → `{ models: "*-mini*,*-nano*", limit: 10000000 }`, in tokens a UTC day. */
const allowance = word
  .regex(/^[^,=]+(,[^,=]+)*=[^=]+$/)
  .transform((text) => text.split("=", 2))
  .pipe(z.tuple([z.string(), scaled(/^\d+(\.\d+)?[kMG]?$/, { min: Number.MIN_VALUE })]))
  .transform(([models, limit]) => ({ models, limit }));

/** An http URL sends the key in the clear: only to this machine. */
const safeUrl = z
  .url({ protocol: /^https?$/ })
  .regex(/^[^?#]*$/)
  .transform((text) => new URL(text))
  .transform((url) => Object.assign(url, { hostname: resolveLocalhost(url.hostname) }))
  .refine((url) => url.protocol === "https:" || isLoopback(url.hostname))
  .refine((url) => !url.username && !url.password)
  .transform((url) => url.href.replace(/\/+$/, ""));

// What an option may be: what that is called in --help, and what is expected where it is something else.
const times = "a duration from 1ms to 24h such as 500ms, 30s, 10m or 1h";
const budgets = "MODELS=TOKENS such as *-mini*,*-nano*=10M";
const urls = "an https URL (http only to this machine) without user, query and fragment";
const truth = z.enum(["true", "false"]).transform((text) => text === "true");
const on = truth.meta({ expects: "true or false" });
const choice = truth.meta({ takes: "true|false", expects: "true or false" });
const host = word.transform(resolveLocalhost).meta({ takes: "HOST", expects: "a host name or an address" });
const port = scaled(/^\d{1,5}$/, { max: 65535 }).meta({ takes: "PORT", expects: "a port from 0 to 65535" });
const usd = scaled(/^(\d+\.?\d*|\.\d+)$/).meta({ takes: "USD", expects: "an amount such as 0, 0.5 or 20" });
const time = scaled(/^\d+(ms|s|m|h)$/, { min: 1, max: DAY }).meta({ takes: "TIME", expects: times });
const source = z.enum(["auto", "costs", "billing"]).meta({ takes: "NAME", expects: "auto, costs or billing" });
const entry = line.regex(/[^\s/]$/).meta({ takes: "NAME", expects: "the name of an entry of pass" });
const command = z.string().meta({ takes: "CMD", expects: "a shell command" });
const limits = z.array(allowance).meta({ takes: "MODELS=TOKENS", expects: budgets });
const projects = z.array(word).meta({ takes: "ID", expects: "a project ID such as proj_abc" });
const url = safeUrl.meta({ takes: "URL", expects: urls });

/** Of each option: the flag, what counts where it is not given (and in a drill), and what it does. */
const OptionsSchema = z.object({
  host: host.meta({ flag: "host", fallback: "0.0.0.0", help: "where to listen, and where to ask" }),
  port: port.meta({ flag: "port", fallback: "5555", help: "its port; 0 listens on any free one and logs it" }),
  thresholdUsd: usd.meta({ flag: "threshold", fallback: "0", help: "open when the two days cost more together" }),
  allowances: limits.meta({ flag: "allowance", help: "open when today's tokens reach this; repeatable" }),
  projects: projects.meta({ flag: "project", help: "count the costs of these projects only; repeatable" }),
  intervalMs: time.meta({ flag: "interval", fallback: "60s", inDrill: "1s", help: "between two looks at the account" }),
  timeoutMs: time.meta({ flag: "timeout", fallback: "10s", help: "for one request, its body included" }),
  maxAgeMs: time.meta({ flag: "max-age", fallback: "10m", help: "how long a good look counts" }),
  whenUnknown: choice.meta({ flag: "when-unknown", fallback: "true", help: "the answer when the state is unknown" }),
  source: source.meta({ flag: "source", fallback: "auto", help: "auto is costs on openai.com, else billing" }),
  baseUrl: url.meta({ flag: "base-url", fallback: "https://api.openai.com/v1", help: "of the API" }),
  passEntry: entry.meta({ flag: "pass-entry", fallback: "OPENAI_API_KEY", help: "where pass keeps the key" }),
  onTrip: command.meta({ flag: "on-trip", help: "run by sh when the answer turns TRUE" }),
  onReset: command.meta({ flag: "on-reset", help: "run by sh when the answer turns FALSE" }),
  drill: on.meta({ flag: "drill", fallback: "false", help: "a simulated account that costs a cent after 10 s" }),
  json: on.meta({ flag: "json", fallback: "false", help: "check prints the INFO object" }),
});

export type Options = z.output<typeof OptionsSchema>;
export type Env = Record<string, string | undefined>;

const some = z.string();
const maybe = z.string().default("");
/** A row of the table; an option that takes nothing is a switch. */
const RowSchema = z.object({ flag: some, takes: maybe, fallback: maybe, inDrill: maybe, help: some, expects: some });

const ROWS = Object.entries(OptionsSchema.shape).map(([key, schema]) => {
  const row = RowSchema.parse(schema.meta());
  const variable = `BREAKER_${row.flag.replaceAll("-", "_").toUpperCase()}`;
  return { ...row, key, schema, variable, isRepeatable: schema instanceof z.ZodArray };
});

const COMMANDS = {
  serve: "answer on TCP until stopped (the default)",
  check: "look at the account once and say what it costs: exit 0 closed, 1 open, 69 unknown",
  status: "ask a running breaker: exit 0 FALSE, 1 TRUE, 69 no answer",
  stop: "stop the breaker that runs on this machine: exit 0, 69 none stopped",
  exec: "exec -- CMD: run CMD while the breaker is closed: exit 75 when stopped by it",
  mcp: "speak MCP on stdin and stdout for a running breaker",
};
const CommandSchema = z.enum(["serve", "check", "status", "stop", "exec", "mcp"]);

/** A command line or a variable that cannot be followed; the message is one sentence for the user. */
export class UsageError extends Error {}

/** The text of `--help`, made from the tables. */
export function formatHelp(): string {
  const line = (left: string, right: string) => `  ${left.padEnd(27)} ${right}`;
  const commands = Object.entries(COMMANDS).map(([name, help]) => line(name, help));
  const options = ROWS.map(({ flag, takes, fallback, inDrill, help }) => {
    const defaults = takes && fallback ? ` [${fallback}${inDrill ? `, ${inDrill} in a drill` : ""}]` : "";
    return line(`--${flag} ${takes}`, help + defaults);
  });
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

/** The values of each flag of a command line, and its other words. Throws a UsageError for a flag that is none. */
function readFlags(args: string[]): { flags: Map<string, string[]>; words: string[] } {
  const types = ROWS.map(({ flag, takes }) => [flag, { type: takes ? "string" : "boolean" }] as const);
  const parsing = { allowPositionals: true, strict: false, tokens: true } as const;
  const { tokens, positionals } = parseArgs({ args, options: Object.fromEntries(types), ...parsing });
  const flags = new Map<string, string[]>();
  for (const { rawName, value, inlineValue } of tokens.filter((token) => token.kind === "option")) {
    const row = ROWS.find(({ flag }) => rawName === `--${flag}`);
    if (!row) throw new UsageError(`${rawName}: no such option, expected one of those in --help`);
    const isMissing = row.takes && !inlineValue && (value ?? "--").startsWith("--");
    if (isMissing) throw new UsageError(`${rawName}: expected ${row.expects} after it; see --help`);
    flags.set(row.flag, [...(flags.get(row.flag) ?? []), value ?? "true"]);
  }
  return { flags, words: positionals };
}

/** The options, from the flags or else the environment. Throws a UsageError for a value that does not fit. */
function readOptions(flags: Map<string, string[]>, env: Env): Options {
  const isDrill = (flags.get("drill")?.at(-1) ?? env["BREAKER_DRILL"]) === "true";
  const given: Record<string, unknown> = {};
  for (const { key, schema, flag, variable, isRepeatable, fallback, inDrill, expects } of ROWS) {
    const text = env[variable] || (isDrill && inDrill) || fallback;
    const values = flags.get(flag) ?? (isRepeatable ? text.split(/\s+/).filter(Boolean) : [text]);
    given[key] = isRepeatable ? values : values.at(-1);
    const [issue] = schema.safeParse(given[key]).error?.issues ?? [];
    if (!issue) continue;
    const bad = JSON.stringify(isRepeatable ? values[Number(issue.path[0])] : values.at(-1));
    throw new UsageError(`${flags.has(flag) ? `--${flag}` : variable} ${bad}: expected ${expects}; see --help`);
  }
  return OptionsSchema.parse(given);
}

/**
 * Reads a command line (without program and script) and the environment: a command with its options, or a text to
 * print. Throws a UsageError that names what was wrong, and what was expected.
 *
 *     parseArguments(["check", "--timeout", "5s"], {}) → { command: "check", options: { timeoutMs: 5000, … }, rest: [] }
 */
export function parseArguments(argv: string[], env: Env) {
  const dashes = argv.includes("--") ? argv.indexOf("--") : argv.length;
  const args = argv.slice(0, dashes);
  const rest = argv.slice(dashes + 1);
  if (args.includes("-h") || args.includes("--help")) return { command: "print" as const, text: formatHelp() };
  if (args.includes("-V") || args.includes("--version")) return { command: "print" as const, text: `${VERSION}\n` };

  const { flags, words } = readFlags(args);
  const options = readOptions(flags, env);
  const [first = "serve", extra] = words;
  const named = CommandSchema.safeParse(first);
  if (!named.success) throw new UsageError(`${first}: expected a command, one of those in --help`);
  if (extra !== undefined) throw new UsageError(`${extra}: expected nothing more after ${first}; see --help`);
  if (named.data === "exec" ? rest.length === 0 : dashes < argv.length) {
    throw new UsageError(`${first}: expected exec -- CMD, the only command with a --; see --help`);
  }
  const [limited] = options.allowances;
  const [bad] = [...options.projects.map((id) => `--project "${id}"`), limited && `--allowance "${limited.models}"`];
  if (bad && resolveSource(options) === "billing") {
    throw new UsageError(`${bad}: expected --source costs with it, billing cannot tell; see --help`);
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
// Every byte from outside passes one of these, in time linear in its length. Unknown members are left
// alone: OpenAI adds some.

/** What a cost counts as that is too small for a number. */
const TINY = 1e-300;

/**
 * An amount: a number, or a string as OpenAI sends them live (`"0E-6176"`, `"0.1739150000000000"`).
 * Missing, empty and non-finite ones are refused; only zero is 0.
 */
export const AmountSchema = z
  .union([z.number(), z.string().regex(/^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i)])
  .transform((value) => {
    if (Math.abs(Number(value)) >= TINY) return Number(value);
    return /^[^e-]*[1-9]/i.test(String(value)) ? TINY : 0;
  })
  .pipe(z.number());

const DAY_SECONDS = DAY / SECOND;

/** 00:00 UTC of a day, in Unix seconds from 2001 to 2286, so that milliseconds do not pass for a far day. */
const DayStartSchema = z.number().min(1e9).max(1e10).multipleOf(DAY_SECONDS);

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

const UsdSchema = z.string().toLowerCase().pipe(z.literal("usd"));

/** A cost in usd. */
export const CostRowSchema = z
  .object({ amount: z.object({ value: AmountSchema, currency: UsdSchema.nullish() }) })
  .transform(({ amount }) => ({ amount: amount.value }));

/** Tokens of a model; `input_tokens` holds the cached ones already. A long name would make globs slow. */
export const UsageRowSchema = z
  .object({ input_tokens: z.int().min(0), output_tokens: z.int().min(0), model: z.string().max(256).nullable() })
  .transform((row) => ({ amount: row.input_tokens + row.output_tokens, model: row.model ?? "" }));

/** A UTC day of costs or of tokens. Older answers call `results` `result`. */
const BucketSchema = z
  .object({
    start_time: DayStartSchema,
    end_time: z.number().optional(),
    results: ListSchema.optional(),
    result: ListSchema.optional(),
  })
  .refine(({ results, result }) => results ?? result, "expected results")
  .refine((bucket) => (bucket.end_time ?? 0) <= bucket.start_time + DAY_SECONDS, "expected one day")
  .transform(({ start_time, results = [], result = [] }) => ({
    day: formatDay(start_time * SECOND),
    rows: [...results, ...result],
  }));

const PageSchema = z
  .object({ object: z.literal("page").optional(), has_more: z.boolean(), next_page: z.string().nullish() })
  .refine((page) => page.has_more === Boolean(page.next_page), "expected next_page just where has_more is true");

/** A credit below 0 would hide a cost. */
const BillingSchema = z.object({ total_usage: AmountSchema.pipe(z.number().min(0)) });
const BillingDaySchema = z
  .object({ timestamp: DayStartSchema, line_items: ListSchema })
  .transform(({ timestamp, line_items }) => ({ day: formatDay(timestamp * SECOND), rows: line_items }));
const BillingItemSchema = z.object({ cost: AmountSchema }).transform(({ cost }) => ({ amount: cost / 100 }));

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
  pid: z.int().positive(),
  startedAt: z.string(),
});

export type Info = z.output<typeof InfoSchema>;

const KeySchema = z.string().regex(/^[\x21-\x7e]+$/);

// ── Money and time ──────────────────────────────────────────────────────────────────────────────

/** `Date.UTC(2026, 10, 22, 23, 59)` → `"2026-11-22"` */
export function formatDay(ms: number): string {
  return new Date(ms).toISOString().slice(0, 10);
}

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
  return patterns.split(",").some((glob) => toRegExp(glob).test(model));
}

/** A glob as an expression that never backtracks: what stands between two stars is found once, in a look ahead. */
function toRegExp(glob: string): RegExp {
  const [first = "", ...parts] = RegExp.escape(glob).replaceAll("\\?", ".").split("\\*");
  const last = parts.pop();
  if (last === undefined) return new RegExp(`^${first}$`, "s");
  const middle = parts.map((part, index) => `(?=(.*?${part}))\\${index + 1}`);
  return new RegExp(`^${first}${middle.join("")}.*${last}$`, "s");
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

/** Makes text from outside fit for a log line: no control characters, no key, at most 300 characters. */
export function redact(text: string): string {
  const line = text.slice(0, 2000).replace(/[\p{Cc}\p{Cf}\u2028\u2029]+/gu, " ");
  const clean = line.replace(/\bsk-\S+/g, "sk-***");
  return clean.length > 300 ? `${clean.slice(0, 300)}…` : clean;
}

// ── The account's answers ───────────────────────────────────────────────────────────────────────
// Each item is read by itself: a cost that was seen counts also where its neighbour cannot be read.

/** A cost in usd, or tokens where there is a model's name, of a UTC day. */
export type Entry = { day: string; amount: number; model?: string };

/** What an answer holds: `next` is the cursor of the next page, `problem` why the look has failed. */
export type Page = { entries: Entry[]; next: string | null; problem: string | null };

/** A page of 1 MiB can hold so many bad rows that to explain them all takes seconds. */
const MAX_PROBLEMS = 10;

function explain(error: z.ZodError): string {
  const [issue] = error.issues;
  return `${issue?.path.join(".") || "the answer"}: ${issue?.message}`;
}

/** The items of a list that fit; what is wrong with the others, or with the list, goes to `problems`. */
function readEach<T>(list: unknown, { schema, problems }: { schema: z.ZodType<T>; problems: string[] }): T[] {
  const found: T[] = [];
  const items = ListSchema.safeParse(list);
  if (!items.success) problems.push(`a list: ${explain(items.error)}`);
  for (const item of items.data ?? []) {
    const read = schema.safeParse(item);
    if (read.success) found.push(read.data);
    else if (problems.push(explain(read.error)) >= MAX_PROBLEMS) break;
  }
  return found;
}

type RowReader = z.ZodType<Omit<Entry, "day">>;
type Lists = { days: z.ZodType<{ day: string; rows: unknown[] }>; rows: RowReader; problems: string[] };

/** The entries of a list of days, each with its rows. */
function readDays(list: unknown, { days, rows, problems }: Lists): Entry[] {
  const read = readEach(list, { schema: days, problems });
  return read.flatMap((of) => readEach(of.rows, { schema: rows, problems }).map((row) => ({ day: of.day, ...row })));
}

/** Reads a page of the Costs or the Usage API. */
export function readPage(body: unknown, rows: RowReader): Page {
  const problems: string[] = [];
  const { data } = JsonSchema.safeParse(body).data ?? {};
  const entries = readDays(data, { days: BucketSchema, rows, problems });
  const envelope = PageSchema.safeParse(body);
  if (!envelope.success) problems.push(explain(envelope.error));
  return { entries, next: envelope.data?.next_page || null, problem: problems[0] ?? null };
}

/**
 * Reads the answer of the billing endpoint, in fractional cents. What `total_usage` holds above the sum
 * of the days is booked on `today`: relays send nothing else.
 */
export function readBilling(body: unknown, today: string): Page {
  const problems: string[] = [];
  const { daily_costs } = JsonSchema.safeParse(body).data ?? {};
  const entries = readDays(daily_costs ?? [], { days: BillingDaySchema, rows: BillingItemSchema, problems });
  const envelope = BillingSchema.safeParse(body);
  if (!envelope.success) problems.push(explain(envelope.error));
  const total = (envelope.data?.total_usage ?? 0) / 100;
  const rest = total - entries.reduce((sum, { amount }) => sum + amount, 0);
  // What is smaller than this is the rounding of the sum.
  if (rest > total * 1e-12) entries.push({ day: today, amount: rest });
  return { entries, next: null, problem: problems[0] ?? null };
}

// ── The decision ────────────────────────────────────────────────────────────────────────────────

/** Costs in usd by UTC day (`"2026-11-22"`), and tokens by day and allowance (`"2026-11-22 *-mini*"`). */
export type Sums = Record<string, number>;

/** What is known of the account: by one look, or by all that came before. */
export interface Reading {
  /** When the last good look began (ms since 1970), null before there was one. */
  asOfMs: number | null;
  sums: Sums;
  /** Why the last look failed, null after a good one, and how long the account wants to be left alone. */
  error: string | null;
  retryAfterMs: number;
}

/** A reading at `now` (ms since 1970), under the user's options. */
export type Moment = { now: number; reading: Reading; options: Options };

/** Nothing seen yet. */
export const UNSEEN: Reading = { asOfMs: null, sums: {}, error: null, retryAfterMs: 0 };

function nameSum(day: string, models = ""): string {
  return models ? `${day} ${models}` : day;
}

/** What a look begins with: a good one is complete, so a day without a row had no cost. */
function startSums(now: number, { allowances }: Options): Sums {
  const { yesterday, today } = listDays(now);
  const names = [yesterday, today, ...allowances.map(({ models }) => nameSum(today, models))];
  return Object.fromEntries(names.map((name) => [name, 0]));
}

/**
 * `sums` with `entries` added. A credit (an amount below 0) never hides a cost; a model counts toward the
 * first allowance that it matches.
 */
export function addEntries(sums: Sums, { entries, options }: { entries: Entry[]; options: Options }): Sums {
  const added = { ...sums };
  for (const { day, amount, model } of entries) {
    const fits = (patterns: string) => model !== undefined && matchesModel(patterns, model);
    const models = options.allowances.find((allowance) => fits(allowance.models))?.models;
    if (model !== undefined && models === undefined) continue;
    const name = nameSum(day, models);
    added[name] = (added[name] ?? 0) + Math.max(amount, 0);
  }
  return added;
}

/** Name by name the larger: what was seen is never taken back. */
export function raiseSums(known: Sums, seen: Sums): Sums {
  const raised = { ...known };
  for (const [name, amount] of Object.entries(seen)) if (amount > (known[name] ?? 0)) raised[name] = amount;
  return raised;
}

/** A good look replaces the reading; a failed one can only raise it. */
export function mergeLook(reading: Reading, look: Reading): Reading {
  return look.error === null ? look : { ...look, asOfMs: reading.asOfMs, sums: raiseSums(reading.sums, look.sums) };
}

/** The days from `first` on and their sums: of costs, or of an allowance. A clock that is behind hides no day. */
function listSince(first: string, { sums, models }: { sums: Sums; models?: string }): Sums {
  const days = Object.keys(sums).filter((name) => name >= first && name === nameSum(name.slice(0, 10), models));
  return Object.fromEntries(days.sort().map((name) => [name.slice(0, 10), sums[name] ?? 0]));
}

function addUp(sums: Sums): number {
  return Object.values(sums).reduce((total, amount) => total + amount, 0);
}

/** The allowances, and the tokens of today that count toward each; null before a good look. */
function listAllowances({ now, reading: { sums, asOfMs }, options }: Moment): Info["allowances"] {
  return options.allowances.map(({ models, limit }) => {
    const used = addUp(listSince(listDays(now).today, { sums, models }));
    return { models, used: used === 0 && asOfMs === null ? null : used, limit };
  });
}

export type Decision = Pick<Info, "open" | "reason" | "message">;

/** What a reading means at `now`. The order is the contract: a cost that was seen wins. */
export function decide(moment: Moment): Decision {
  const { now, reading, options } = moment;
  const { asOfMs, sums, error } = reading;
  const { yesterday, today } = listDays(now);
  const days = listSince(yesterday, { sums });
  const total = addUp(days);
  if (total > options.thresholdUsd) {
    const costs = Object.entries(days).filter(([, cost]) => cost > 0);
    const parts = costs.map(([day, cost]) => `${formatAmount(cost)} usd on ${day}`);
    return { open: true, reason: "cost", message: `${parts.join(" and ")} (UTC)` };
  }
  const full = listAllowances(moment).find(({ used, limit }) => (used ?? 0) >= limit);
  if (full) {
    const message = `${full.used} of ${full.limit} tokens of ${full.models} used on ${today} (UTC)`;
    return { open: true, reason: "allowance", message };
  }
  // A look from after midnight says nothing of the day before yesterday, should the clock go back.
  const isCovered = asOfMs !== null && listDays(asOfMs).yesterday <= yesterday;
  if (isCovered && Math.abs(now - asOfMs) <= options.maxAgeMs) {
    const cost = total > 0 ? `${formatAmount(total)} usd, within the threshold,` : "no cost";
    return { open: false, reason: "none", message: `${cost} on ${yesterday} and ${today} (UTC)` };
  }
  const ageSeconds = Math.floor((now - (asOfMs ?? 0)) / SECOND);
  const age = ageSeconds > 0 ? `is ${ageSeconds} s old` : "lies in the future, check this machine's clock";
  const cause = asOfMs === null ? "no good look at the account yet" : `the last good look ${age}`;
  return { open: options.whenUnknown, reason: "unknown", message: error === null ? cause : `${cause}: ${error}` };
}

/** The INFO object of a reading at `now`, for a breaker that started at `startedMs`. */
export function describe({ startedMs, ...moment }: Moment & { startedMs: number }): Info {
  const { now, reading, options } = moment;
  const { asOfMs, sums, error } = reading;
  const days = listSince(listDays(now).yesterday, { sums });
  return {
    ...decide(moment),
    cost: Object.keys(days).length > 0 ? { total: addUp(days), currency: "usd", days } : null,
    threshold: options.thresholdUsd,
    allowances: listAllowances(moment),
    asOf: asOfMs === null ? null : new Date(asOfMs).toISOString(),
    ageSeconds: asOfMs === null ? null : Math.max(Math.floor((now - asOfMs) / SECOND), 0),
    error,
    source: resolveSource(options),
    version: VERSION,
    pid: process.pid,
    startedAt: new Date(startedMs).toISOString(),
  };
}

// ── The protocol ────────────────────────────────────────────────────────────────────────────────
// One connection, one question: a line finds its row in this table.

/** What a reply may draw on. */
export type View = { decide: () => Decision; describe: () => Info };

/** What is asked, by a line of the protocol or a message of MCP. */
export interface Question {
  /** The answer without its newline; null where none is due. */
  reply: (view: View) => string | null;
  /** The answer rests on a look, and waits for one. */
  needsLook?: true;
}

interface LineCommand extends Question {
  name: string;
  help: string;
  /** Asked by this machine only: it learns amounts. */
  localOnly?: true;
}

const STATUS_HELP = "TRUE when the account incurred a cost today or yesterday (UTC) or that is not known, else FALSE";
const INFO_HELP = "reason, amounts and age as a line of JSON, for this machine only";

/** A new command is a new row. */
export const LINE_COMMANDS: LineCommand[] = [
  { name: "STATUS", help: STATUS_HELP, needsLook: true, reply: (view) => (view.decide().open ? "TRUE" : "FALSE") },
  { name: "HELP", help: "this list", reply: () => HELP },
  { name: "INFO", help: INFO_HELP, needsLook: true, localOnly: true, reply: (view) => JSON.stringify(view.describe()) },
];

const HELP = [
  ...LINE_COMMANDS.map(({ name, help }) => `${name.padEnd(6)} ${help}`),
  "{      begins a message of the Model Context Protocol, one a line, for this machine only",
].join("\n");

function say(text: string | null): Question {
  return { reply: () => text };
}

const UNKNOWN = say("ERR Unknown Command");
const NOT_ALLOWED = say("ERR Not Allowed");
const TOO_LONG = say("ERR Line Too Long");
const BUSY = say("ERR Busy");

/** Finds what a line asks for: `findQuestion(" status\r", { isLocal: () => false })` → the row of STATUS */
export function findQuestion(line: string, { isLocal }: { isLocal: () => boolean }): Question {
  const [, word = ""] = /^[ \t\r]*([a-z]+)[ \t\r]*$/i.exec(line) ?? [];
  const found = LINE_COMMANDS.find(({ name }) => name === word.toUpperCase());
  return found?.localOnly && !isLocal() ? NOT_ALLOWED : (found ?? UNKNOWN);
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
  return { line: input.toString("utf8", 0, end), rest: input.subarray(end + 1) };
}

/** Whether the first byte that is not blank is a brace: the line is MCP. */
export function beginsMcp(input: Buffer): boolean {
  return /^[ \t\r]*\{/.test(input.toString("latin1", 0, MAX_LINE_BYTES));
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

type Id = z.output<typeof IdSchema>;
type Json = Record<string, unknown>;

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

function fail(id: Id | undefined, error: { code: number; message: string; data?: Json }): Question {
  return say(JSON.stringify({ jsonrpc: "2.0", id, error }));
}

/** What one line of MCP asks for, a bad one too. */
export function readMcp(line: string): Question {
  if (!line.trim()) return say(null);
  const json = parseJson(line);
  if (json === undefined) return fail(undefined, { code: -32700, message: "Not JSON" });
  const envelope = JsonSchema.safeParse(json).data ?? {};
  const id = IdSchema.safeParse(envelope["id"]).data;
  const message = MessageSchema.safeParse(json);
  if (!message.success) {
    if ("result" in envelope || "error" in envelope) return say(null);
    return fail(id, { code: -32600, message: "Not a request of JSON-RPC 2.0" });
  }
  if (!("id" in envelope)) return say(null); // A notification.
  if (id === undefined) return fail(id, { code: -32600, message: "id: expected a string or an integer" });
  const { method, params } = message.data;
  const known = ParamsSchema.safeParse(params ?? {});
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
  return readRequest(id, { method, params: known.data, modern });
}

function readRequest(id: Id, call: { method: string; params: Json; modern: boolean }): Question {
  const { method, params, modern } = call;
  const invalid = (message: string) => fail(id, { code: -32602, message });
  const envelope = modern ? { resultType: "complete", _meta: { [`${META}serverInfo`]: SERVER_INFO } } : {};
  const cached = modern ? { ttlMs: HOUR, cacheScope: "public" } : {};
  const format = (result: Json) => JSON.stringify({ jsonrpc: "2.0", id, result: { ...result, ...envelope } });
  const succeed = (result: Json) => say(format(result));
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
      return say(JSON.stringify({ jsonrpc: "2.0", ...notification }));
    }
    case "modern tools/list":
    case "handshake tools/list":
      if (params["cursor"] !== undefined) return invalid("cursor: expected none, the list has one page");
      return succeed({ tools: [describeTool()], ...cached });
    case "modern tools/call":
    case "handshake tools/call":
      if (params["name"] !== TOOL) return invalid(`name: expected ${TOOL}, the only tool`);
      return { needsLook: true, reply: (view) => format(formatStatus(view.describe())) };
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
  /** The lines of stdin. */
  lines: AsyncIterable<string>;
  /** To stdout as it is, and to stderr as a line. */
  print: (text: string) => Promise<unknown>;
  log: (text: string) => void;
  /** Whether stdout is a terminal that wants colours. */
  isColoured: boolean;
}

/** What effects work with. */
export interface World extends Surroundings {
  options: Options;
  /** Ends the command in good order, and aborts `signal`: nothing that was started outlives it. */
  stop: () => void;
  signal: AbortSignal;
}

/** How long a peer that makes no progress gets, a breaker that is gone, and a command that was told to end. */
const PATIENCE_MS = 10 * SECOND;
const CHILD_LIMIT_MS = 30 * SECOND;
const MAX_READ_BYTES = 1024 * 1024;

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Waits as long as something holds, `limitMs` at most; false where it still holds then. */
async function waitWhile(holds: () => boolean, limitMs: number): Promise<boolean> {
  const endMs = performance.now() + limitMs;
  while (holds()) {
    if (performance.now() > endMs) return false;
    await Bun.sleep(50);
  }
  return true;
}

/** All bytes of a stream; throws where there are more than 1 MiB. */
async function readAll(stream: ReadableStream<Uint8Array>): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of stream) {
    size += chunk.byteLength;
    if (size > MAX_READ_BYTES) throw new Error("it is over 1 MiB");
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
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

/** The signals that end a command, or that it makes something of. */
const SIGNALS: NodeJS.Signals[] = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2"];

/** Lets `hear` have the signals, until `end`. */
function hearSignals(hear: (name: NodeJS.Signals) => void, end: AbortSignal): void {
  for (const name of SIGNALS) {
    const listener = () => hear(name);
    process.on(name, listener);
    end.addEventListener("abort", () => process.off(name, listener));
  }
}

/** What runs a program: its environment, what ends it early, and what it reads. */
type Run = { env: Env; signal: AbortSignal; input?: string; limitMs?: number };

/**
 * Runs a program in a process group of its own; gives what it printed and its exit code. Throws where it cannot be
 * started, or was killed with its group: after `limitMs`, by `signal`, or for printing more than 1 MiB.
 */
export async function runProgram(argv: string[], { env, signal, input, limitMs = CHILD_LIMIT_MS }: Run) {
  signal.throwIfAborted();
  const stdin = input === undefined ? "ignore" : Buffer.from(input);
  const child = Bun.spawn(argv, { env, stdin, stdout: "pipe", stderr: "pipe", detached: true });
  const cut = Promise.withResolvers<never>();
  const limit = AbortSignal.any([signal, AbortSignal.timeout(limitMs)]);
  limit.addEventListener("abort", () => cut.reject(new Error(`it took longer than ${limitMs / SECOND} s`)));
  try {
    const ended = Promise.all([child.exited, readAll(child.stdout), readAll(child.stderr)]);
    const [code, stdout, stderr] = await Promise.race([ended, cut.promise]);
    return { code, stdout: stdout.toString(), stderr: stderr.toString() };
  } catch (error) {
    kill(-child.pid, "SIGKILL");
    throw error;
  }
}

/** The first line of `pass show -- ENTRY`; throws an Error that says what to do. */
async function readPass({ options: { passEntry: entry }, env, signal }: World): Promise<string> {
  try {
    const { code, stdout, stderr } = await runProgram(["pass", "show", "--", entry], { env: childEnv(env), signal });
    if (code !== 0) throw new Error(stderr.trim() || `exit code ${code}`);
    const [line = ""] = stdout.split("\n", 1);
    return line === entry ? "" : line; // Of a folder, pass prints the name and a tree.
  } catch (error) {
    const store = `store an admin key with: pass insert ${entry} (or set OPENAI_ADMIN_KEY)`;
    const advice = `install pass, ${store}, or unlock it once in a terminal with: pass show ${entry}`;
    throw new Error(`pass show ${entry} failed, ${redact(messageOf(error))}; ${advice}`);
  }
}

/** The key, OPENAI_ADMIN_KEY or else from pass; throws an Error that says what to do. */
async function readKey(world: World): Promise<string> {
  if (world.options.drill) return "drill";
  const given = world.env["OPENAI_ADMIN_KEY"];
  const key = KeySchema.safeParse((given || (await readPass(world))).trim());
  if (key.success) return key.data;
  const place = given ? "OPENAI_ADMIN_KEY" : `the first line of ${world.options.passEntry} in pass`;
  throw new Error(`${place} does not look like a key; put an admin key there`);
}

// ── Effects: the look ───────────────────────────────────────────────────────────────────────────

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
  if (status >= 300 && status < 400) return "a redirect is not followed, set --base-url to where it leads";
  if (status === 404) return "check --base-url and --source";
  if (status !== 401 && status !== 403) return "the next look comes by itself";
  if (resolveSource(options) === "billing") return "check the key; api.openai.com wants --source costs";
  const store = `run: pass insert ${options.passEntry} (or set OPENAI_ADMIN_KEY)`;
  return `create an admin key with the scope api.usage.read at ${KEYS_URL} and ${store}`;
}

/** Reads a good answer, and throws for any other. Nothing that the account says is repeated: it may quote the key. */
async function readAnswer(response: Response, { options, now }: World): Promise<unknown> {
  const { status, headers } = response;
  if (status !== 200) throw new Error(`HTTP ${status}; ${advise(status, options)}`);
  if ((headers.get("content-encoding") ?? "identity") !== "identity") {
    throw new Error("the answer is compressed, though asked for as it is; check --base-url");
  }
  const date = headers.get("date");
  if (date !== null && !(Math.abs(Date.parse(date) - now()) <= MAX_CLOCK_SKEW_MS)) {
    throw new Error("the answer's Date is more than 10 minutes off; set this machine's clock");
  }
  const bytes = await readAll(response.body ?? new Blob([]).stream());
  const body = parseJson(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  if (body === undefined) throw new Error("the answer is not JSON; check --base-url");
  const { error } = JsonSchema.safeParse(body).data ?? {};
  if (error !== undefined && error !== null) throw new Error("the answer is an error with HTTP 200; check --base-url");
  return body;
}

/** Reads all pages of an endpoint, and lets `seen` have the entries of each. */
async function readPages(
  { path, read }: Endpoint,
  { ask, seen }: { ask: (path: string) => Promise<unknown>; seen: (entries: Entry[]) => void },
): Promise<void> {
  const cursors = new Set<string>();
  for (let query = ""; cursors.size < MAX_PAGES;) {
    const { entries, next, problem } = read(await ask(path + query));
    seen(entries);
    if (problem !== null) throw new Error(problem);
    if (next === null) return;
    if (cursors.has(next)) throw new Error("next_page repeats itself, the pages have no end");
    cursors.add(next);
    query = `&page=${encodeURIComponent(next)}`;
  }
  throw new Error(`there are more than ${MAX_PAGES} pages`);
}

/** Looks at the account once; `onSeen` hears the sums seen so far. Never throws: a failed look holds its `error`. */
export type Look = (onSeen: (sums: Sums) => void) => Promise<Reading>;

/** Makes the look at the account that the options ask for; it keeps the key in memory until told to forget it. */
export function createLook(world: World): { look: Look; forgetKey: () => void } {
  const { options, now, signal } = world;
  let key: Promise<string> | null = null;
  const forgetKey = () => void (key = null);

  async function request(path: string, { secret, look }: { secret: string; look: Reading }): Promise<unknown> {
    const asked = fetch(`${options.baseUrl}${path}`, {
      headers: { authorization: `Bearer ${secret}`, "accept-encoding": "identity" },
      decompress: false,
      redirect: "manual",
      keepalive: false,
      verbose: false,
      tls: { rejectUnauthorized: true },
      signal: AbortSignal.any([signal, AbortSignal.timeout(options.timeoutMs)]),
    });
    const response = await asked.catch((error) => {
      throw new Error(`${messageOf(error)}; check the network and --base-url`);
    });
    if (response.status === 401 || response.status === 403) forgetKey();
    look.retryAfterMs = Math.max(look.retryAfterMs, parseRetryAfter(response.headers.get("retry-after"), now()));
    return readAnswer(response, world);
  }

  async function look(onSeen: (sums: Sums) => void): Promise<Reading> {
    const beganMs = now();
    const look: Reading = { ...UNSEEN, asOfMs: beganMs, sums: startSums(beganMs, options) };
    const note = (what: string) => (error: unknown) => {
      look.error ??= `Cannot read ${what}: ${messageOf(error)}`;
    };
    const secret = await (key ??= readKey(world)).catch(note("the key"));
    if (!secret) {
      forgetKey();
      return look;
    }
    const ask = (path: string) => request(path, { secret, look });
    const seen = (entries: Entry[]) => onSeen((look.sums = addEntries(look.sums, { entries, options })));
    const reads = listEndpoints(options, beganMs).map((endpoint) =>
      readPages(endpoint, { ask, seen }).catch(note(endpoint.what)),
    );
    await Promise.all(reads);
    return look;
  }

  return { look, forgetKey };
}

// ── Effects: the watch ──────────────────────────────────────────────────────────────────────────
// One timer and one look at a time, whoever asks: every answer comes from the reading in memory.

/** When the wall clock moves so far from the monotonic one, the machine was asleep, or somebody set it. */
const CLOCK_JUMP_MS = 10 * SECOND;

/**
 * Looks again and again until the end. The answers are settled once a look has ended that began since the clocks last
 * jumped apart; `onAnswer` hears only those.
 */
export function startWatch(world: World, { look, onAnswer }: { look: Look; onAnswer: (info: Info) => void }) {
  const { options, now, signal } = world;
  const startedMs = now();
  const readLead = () => now() - performance.now();
  let leadMs = readLead();
  let reading = UNSEEN;
  let isSettled = false;
  /** What questions wait for before the answers are settled, `--timeout` at most; null when the wait is over. */
  let wait: PromiseWithResolvers<void> | null = null;
  let alarm = Promise.withResolvers<void>();
  let described: { atMs: number; reading: Reading; info: Info } | null = null;

  function beginWait(): void {
    isSettled = false;
    const begun = (wait ??= Promise.withResolvers<void>());
    setTimeout(() => begun === wait && endWait(), options.timeoutMs);
  }

  function endWait(): void {
    wait?.resolve();
    wait = null;
  }

  /** INFO as of now, made once for all who ask within the same millisecond. */
  function describeNow(): Info {
    const atMs = now();
    if (described?.atMs !== atMs || described.reading !== reading) {
      described = { atMs, reading, info: describe({ now: atMs, reading, options, startedMs }) };
    }
    return described.info;
  }

  function noticeJump(): void {
    const movedMs = readLead() - leadMs;
    if (Math.abs(movedMs) <= CLOCK_JUMP_MS) return;
    leadMs += movedMs;
    // By a clock that was set back, nobody can tell how old the last good look is.
    if (movedMs < 0) reading = { ...reading, asOfMs: null, error: "this machine's clock was set back" };
    beginWait();
    alarm.resolve();
  }

  /** Takes in what a look has found that began while the clocks were `beganLeadMs` apart. */
  function take(found: Reading, beganLeadMs: number): void {
    noticeJump();
    if (leadMs !== beganLeadMs) {
      reading = { ...reading, sums: raiseSums(reading.sums, found.sums) };
      return;
    }
    reading = mergeLook(reading, found);
    isSettled = true;
    endWait();
    onAnswer(describeNow());
  }

  async function keepLooking(): Promise<void> {
    for (let failures = 0; ;) {
      await alarm.promise;
      if (signal.aborted) return;
      alarm = Promise.withResolvers();
      const beganLeadMs = leadMs;
      const found = await look((seen) => (reading = { ...reading, sums: raiseSums(reading.sums, seen) }));
      if (signal.aborted) return;
      take(found, beganLeadMs);
      failures = found.error === null ? 0 : failures + 1;
      const delayMs = failures === 0 ? options.intervalMs : computeBackoff(failures, { ...options, ...found });
      const timer = setTimeout(alarm.resolve, delayMs);
      void alarm.promise.then(() => clearTimeout(timer));
    }
  }

  signal.addEventListener("abort", () => {
    alarm.resolve();
    endWait();
  });
  beginWait();
  void keepLooking();
  return {
    decide: () => decide({ now: now(), reading, options }),
    describe: describeNow,
    /** Looks now, or once more where a look is under way; the first call starts the watch. */
    hurry: () => alarm.resolve(),
    /** To be called every second: age and midnight change the answer without a look. */
    tick(): void {
      noticeJump();
      if (isSettled) onAnswer(describeNow());
    },
    /** Resolves when a question can be answered; null when it can be now. */
    settled(): Promise<void> | null {
      noticeJump();
      return wait?.promise ?? null;
    },
  };
}

export type Watch = ReturnType<typeof startWatch>;

// ── Effects: the server ─────────────────────────────────────────────────────────────────────────

const MAX_CONNECTIONS = 1024;
/** So that idle agents leave room for everybody else. */
const MAX_MCP_CONNECTIONS = MAX_CONNECTIONS / 2;
/** How much a connection is answered at a time, and how much may wait unread or unsent on all together. */
const REPLIES_LENGTH = 64 * 1024;
const MAX_HELD_BYTES = 16 * 1024 * 1024;

interface Peer {
  /** Its next line is awaited; that line waits for a look, unread; its last answer is on the way; it was told so. */
  phase: "asking" | "waiting" | "answered" | "closed";
  /** Whether each of its lines is a message of MCP. */
  isMcp: boolean;
  /** Whether the client has closed its half. */
  ended: boolean;
  input: Buffer;
  /** What the socket has not taken yet. */
  unsent: Buffer;
  /** When to cut the connection off, ms on the monotonic clock. */
  deadlineMs: number;
}

type Socket = Bun.Socket<Peer>;

/** What a peer asks next, and what it has sent behind that; null where that is not known yet. */
function readQuestion(socket: Socket, { isCrowded }: { isCrowded: () => boolean }) {
  const { phase, input, ended } = socket.data;
  if (phase !== "asking") return null;
  // This machine is on loopback, or at the very address that it connected to.
  const isLocal = () => isLoopback(socket.remoteAddress) || socket.remoteAddress === socket.localAddress;
  const isMcp = socket.data.isMcp || beginsMcp(input);
  const last = (question: Question) => ({ question, rest: NOTHING, isMcp: false });
  if (isMcp && !socket.data.isMcp && !isLocal()) return last(NOT_ALLOWED);
  if (isMcp && !socket.data.isMcp && isCrowded()) return last(BUSY);
  const cut = takeLine(input, { ended, limit: isMcp ? MAX_MCP_LINE_BYTES : MAX_LINE_BYTES });
  if (cut === "incomplete" || (isMcp && input.length === 0)) return null;
  if (cut === "too long") return last(TOO_LONG);
  return isMcp ? { question: readMcp(cut.line), rest: cut.rest, isMcp } : last(findQuestion(cut.line, { isLocal }));
}

/** Hands the socket what it takes. */
function send(socket: Socket, bytes: Buffer): void {
  const peer = socket.data;
  const taken = Math.max(socket.write(bytes), 0);
  if (taken > 0 || peer.deadlineMs === Infinity) peer.deadlineMs = performance.now() + PATIENCE_MS;
  peer.unsent = taken < bytes.length ? bytes.subarray(taken) : NOTHING;
}

/** Makes the function that does all that can be done for a peer now. */
function createPump(peers: Set<Socket>, watch: Pick<Watch, "decide" | "describe" | "settled">) {
  let isResuming = false;
  const isCrowded = () => [...peers].filter(({ data }) => data.isMcp).length >= MAX_MCP_CONNECTIONS;
  const countHeld = () => [...peers].reduce((sum, { data }) => sum + data.input.length + data.unsent.length, 0);

  /** Takes up all that wait, once they can be answered. */
  async function resumeAfter(wait: Promise<void>): Promise<void> {
    if (isResuming) return;
    isResuming = true;
    await wait;
    isResuming = false;
    for (const socket of peers) {
      if (socket.data.phase !== "waiting") continue;
      socket.data.phase = "asking";
      socket.resume();
      pump(socket);
    }
  }

  /** What a peer is to be told now. */
  function answer(socket: Socket): string {
    const peer = socket.data;
    let replies = "";
    for (let asked; replies.length < REPLIES_LENGTH && (asked = readQuestion(socket, { isCrowded }));) {
      peer.isMcp = asked.isMcp;
      const wait = asked.question.needsLook ? watch.settled() : null;
      if (wait) {
        peer.phase = "waiting";
        void resumeAfter(wait);
        break;
      }
      peer.input = asked.rest;
      if (!peer.isMcp) peer.phase = "answered";
      const reply = asked.question.reply(watch);
      if (reply !== null) replies += `${reply}\n`;
    }
    return replies;
  }

  function pump(socket: Socket): void {
    const peer = socket.data;
    if (peer.unsent.length > 0) send(socket, peer.unsent);
    for (let replies; peer.unsent.length === 0 && (replies = answer(socket));) send(socket, Buffer.from(replies));
    const isSent = peer.unsent.length === 0;
    if (isSent && (peer.phase === "waiting" || peer.isMcp)) peer.deadlineMs = Infinity;
    if (!isSent || peer.phase === "waiting") {
      socket.pause();
      if (countHeld() > MAX_HELD_BYTES) socket.terminate();
    } else if (peer.phase === "answered" || (peer.isMcp && peer.ended && peer.input.length === 0)) {
      peer.phase = "closed";
      peer.deadlineMs = performance.now() + PATIENCE_MS;
      socket.shutdown();
    } else peer.input = Buffer.from(peer.input); // A copy, so that what was read before it is freed.
  }

  return pump;
}

/** Answers questions over TCP. Throws an Error where it cannot listen. */
export function startServer({ options: { host, port } }: World, watch: Pick<Watch, "decide" | "describe" | "settled">) {
  const peers = new Set<Socket>();
  const pump = createPump(peers, watch);
  const listener = Bun.listen<Peer>({
    hostname: host,
    port,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        const isBusy = peers.size >= MAX_CONNECTIONS;
        if (peers.size >= 2 * MAX_CONNECTIONS) return void socket.terminate();
        peers.add(socket);
        socket.data = {
          phase: isBusy ? "answered" : "asking",
          isMcp: false,
          ended: false,
          input: NOTHING,
          unsent: isBusy ? Buffer.from(`${BUSY.reply(watch)}\n`) : NOTHING,
          deadlineMs: performance.now() + PATIENCE_MS,
        };
        if (isBusy) pump(socket);
      },
      data(socket, chunk) {
        const peer = socket.data;
        if (peer.phase === "answered" || peer.phase === "closed") return;
        peer.input = peer.input.length > 0 ? Buffer.concat([peer.input, chunk]) : chunk;
        pump(socket);
      },
      end(socket) {
        socket.data.ended = true;
        if (socket.data.phase === "closed") socket.end();
        else pump(socket);
      },
      drain(socket) {
        socket.resume();
        pump(socket);
      },
      close: (socket) => void peers.delete(socket),
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
      await waitWhile(() => [...peers].some(({ data }) => data.phase !== "asking"), SECOND);
      listener.stop(true);
    },
  };
}

// ── Effects: hooks ──────────────────────────────────────────────────────────────────────────────

async function runHook(info: Info, { options, env, signal, log }: World): Promise<void> {
  const [name, command] = info.open ? ["--on-trip", options.onTrip] : ["--on-reset", options.onReset];
  if (!command) return;
  const variables = {
    BREAKER_OPEN: info.open ? "TRUE" : "FALSE",
    BREAKER_REASON: info.reason,
    BREAKER_MESSAGE: info.message,
    BREAKER_COST: String(info.cost?.total ?? ""),
  };
  const run = { env: childEnv(env, variables), signal, input: `${JSON.stringify(info)}\n` };
  try {
    const { code, stdout, stderr } = await runProgram(["sh", "-c", command], run);
    for (const line of `${stdout}\n${stderr}`.split("\n")) if (line.trim()) log(`${name}: ${redact(line)}`);
    if (code !== 0) log(`${name}: ended with exit code ${code}`);
  } catch (error) {
    log(`${name}: killed, ${messageOf(error)}`);
  }
}

/** Makes the function that runs the hooks: one at a time, while only the newest change of the answer waits. */
function createHooks(world: World): (info: Info) => void {
  let wasOpen = false;
  let newest: Info | null = null;
  let running: Promise<void> | null = null;
  async function runAll(): Promise<void> {
    for (let info; (info = newest) && !world.signal.aborted;) {
      newest = null;
      await runHook(info, world);
    }
    running = null;
  }
  return (info) => {
    if (info.open === wasOpen) return;
    wasOpen = info.open;
    newest = info;
    running ??= runAll();
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
        if (text.length > MAX_READ_BYTES) socket.terminate();
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
  throw new Error(`What listens at port ${address.port} answers "${redact(text)}"; expected TRUE or FALSE`);
}

/** What the breaker at `address` knows; throws where that is none, or does not take this machine for its own. */
async function askInfo(address: Address): Promise<Info> {
  const text = await ask("INFO", address);
  const info = InfoSchema.safeParse(parseJson(text));
  if (info.success) return info.data;
  throw new Error(`What listens at port ${address.port} answers "${redact(text)}"; expected INFO of a breaker`);
}

// ── Effects: stop and exec ──────────────────────────────────────────────────────────────────────

/** What `ps` prints; nothing where it finds none, or cannot be run. */
function runPs(...args: string[]): string {
  try {
    return Bun.spawnSync(["ps", "-ww", ...args], { env: { PATH: "/usr/bin:/bin" } }).stdout.toString();
  } catch {
    return "";
  }
}

/** Whether `pid` is a breaker that serves from this file at `port`, as far as its arguments tell. */
function isBreaker(pid: number, port: number): boolean {
  const [path, name] = [import.meta.path, basename(import.meta.path)].map(RegExp.escape);
  const form = new RegExp(`^\\S*bun\\S* (run )?(-\\S+ )*(${path}|\\S*/${name}|${name})( serve)?(?<options> --.*)?$`);
  const { options = "" } = form.exec(runPs("-o", "args=", "-p", String(pid)).trimEnd())?.groups ?? { options: "none" };
  const ports = [...options.matchAll(/ --port[= ](\d+)/g)].map(([, digits]) => Number(digits));
  return options !== "none" && [0, port].includes(ports.at(-1) ?? port);
}

/** Ends the breaker that answers at `address`, and waits until it is gone; throws where that cannot be. */
async function stopBreaker(address: Address): Promise<number> {
  const { pid } = await askInfo(address);
  if (!isBreaker(pid, address.port)) {
    const advice = "stop it where it runs, or with: kill";
    throw new Error(`Process ${pid} is no breaker that runs here as bun breaker.ts at ${address.port}; ${advice}`);
  }
  if (!kill(pid, "SIGTERM")) throw new Error(`Process ${pid} cannot be stopped; try it as the user who started it`);
  if (await waitWhile(() => isBreaker(pid, address.port), address.timeoutMs)) return EXIT.closed;
  throw new Error(`Process ${pid} does not stop; end it with: kill -9 ${pid}`);
}

/** `pids` and what descends from them at this moment. */
function findFamily(pids: number[]): number[] {
  const rows = [...runPs("-A", "-o", "pid=,ppid=").matchAll(/(\d+) +(\d+)/g)];
  const family = new Set(pids);
  for (let before = 0; before < family.size;) {
    before = family.size;
    for (const [, pid, parent] of rows) if (family.has(Number(parent))) family.add(Number(pid));
  }
  return [...family];
}

/** Ends a command and its family, the hard way after 10 s. */
async function endCommand({ pid, exited }: Bun.Subprocess): Promise<void> {
  let family = findFamily([pid]);
  for (const member of family) kill(member, "SIGTERM");
  // Who has ended is forgotten at once: its pid may soon be another's.
  const someRun = () => (family = family.filter((member) => kill(member, 0))).length > 0;
  if (!(await waitWhile(someRun, PATIENCE_MS))) {
    for (const member of findFamily(family)) kill(member, "SIGKILL");
  }
  await exited;
}

async function explainTrip(address: Address): Promise<string> {
  const info = await askInfo({ ...address, timeoutMs: SECOND }).catch(() => null);
  return redact(info?.message ?? "TRUE");
}

/** Asks every second, and gives the reason once the breaker is open, or unknown for too long. */
async function waitForTrip(address: Address, { options, child }: { options: Options; child: Bun.Subprocess }) {
  for (let failingSinceMs = Infinity; ;) {
    await Bun.sleep(SECOND);
    if (child.exitCode !== null || child.signalCode !== null) return null;
    try {
      if (await askStatus(address)) return await explainTrip(address);
      failingSinceMs = Infinity;
    } catch (error) {
      const nowMs = performance.now();
      failingSinceMs = Math.min(failingSinceMs, nowMs);
      if (nowMs - failingSinceMs >= PATIENCE_MS && options.whenUnknown) return messageOf(error);
    }
  }
}

/**
 * Runs a command as long as the breaker is closed; gives its exit code, 75 where the breaker refused or
 * stopped it. Throws where no breaker answers at the start.
 */
async function guard(argv: string[], { world, address }: { world: World; address: Address }): Promise<number> {
  const { options, env, log } = world;
  if (await askStatus(address)) {
    log(`the breaker is open, ${argv[0]} was not started: ${await explainTrip(address)}`);
    return EXIT.stopped;
  }
  let child: Bun.Subprocess | null = null;
  const hasTerminal = [0, 1, 2].some(isatty);
  const passOn = (name: NodeJS.Signals) => {
    // The terminal sends these to the command itself.
    const isTyped = hasTerminal && (name === "SIGINT" || name === "SIGQUIT");
    if (!isTyped) child?.kill(name);
  };
  hearSignals(passOn, world.signal);
  try {
    child = Bun.spawn(argv, { env: childEnv(env), stdio: ["inherit", "inherit", "inherit"] });
  } catch (error) {
    log(`cannot run ${argv[0]}: ${messageOf(error)}`);
    return z.object({ code: z.literal("ENOENT") }).safeParse(error).success ? EXIT.notFound : EXIT.notExecutable;
  }
  const reason = await Promise.race([child.exited.then(() => null), waitForTrip(address, { options, child })]);
  if (reason === null) return child.exited;
  log(`the breaker is open, stopping ${argv[0]}: ${reason}`);
  await endCommand(child);
  return EXIT.stopped;
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

/** Serves a simulated account on loopback that costs one cent after 10 s; gives its base URL. */
function startDrill({ now, signal }: World): string {
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

/** The world with the account that is looked at: in a drill its own. */
function prepareAccount(world: World): World {
  const { drill, baseUrl } = world.options;
  if (!drill && !baseUrl.startsWith("http:")) return world;
  // Bun would send even a request to loopback through HTTP_PROXY, and the key with it.
  process.env["NO_PROXY"] = process.env["no_proxy"] = "*";
  if (!drill) return world;
  return { ...world, options: { ...world.options, baseUrl: startDrill(world) } };
}

/** Starts what listens at `place`; throws an Error that says what to do where it cannot. */
function listen<Listener>({ flag, place }: { flag: string; place: string }, start: () => Listener): Listener {
  try {
    return start();
  } catch (error) {
    const advice = `choose another ${flag}, or stop what listens there`;
    throw new Error(`Cannot listen at ${place}: ${messageOf(error)}; ${advice}`);
  }
}

/** The command `serve`. */
async function serve(given: World): Promise<number> {
  const log = (text: string) => given.log(`${new Date(given.now()).toISOString()} ${text}`);
  const world = prepareAccount({ ...given, log });
  const { options, signal, stop } = world;
  const { look, forgetKey } = createLook(world);
  const runHooks = createHooks(world);
  let last: Info | null = null;
  const onAnswer = (info: Info) => {
    runHooks(info);
    if (info.error !== (last?.error ?? null)) log(info.error ?? "the account can be read again");
    if (info.open !== last?.open) log(`${info.open ? "TRUE" : "FALSE"}, ${info.message}`);
    last = info;
  };
  const watch = startWatch(world, { look, onAnswer });
  const server = listen({ flag: "--port", place: `${options.host}:${options.port}` }, () => startServer(world, watch));
  const refresh = () => {
    forgetKey();
    watch.hurry();
  };
  hearSignals((name) => (name === "SIGHUP" ? refresh() : stop()), signal);
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
  return EXIT.closed;
}

/** What `check` prints for a person: the days, the allowances, and the verdict. */
export function formatCheck(info: Info, { now, isColoured }: { now: number; isColoured: boolean }): string {
  const { yesterday, today } = listDays(now);
  const rows = [yesterday, today].map((day): [string, string] => {
    const cost = info.cost?.days[day];
    return [day, cost === undefined ? "unknown" : `${formatAmount(cost)} usd`];
  });
  for (const { models, used, limit } of info.allowances) rows.push([models, `${used ?? "unknown"} of ${limit} tokens`]);
  const width = Math.max(...rows.map(([name]) => name.length));
  const table = rows.map(([name, value]) => `${name.padEnd(width)}  ${value}\n`).join("");
  const verdict = { none: "closed", cost: "open", allowance: "open", unknown: "unknown" }[info.reason];
  const colour = { none: 32, cost: 31, allowance: 31, unknown: 33 }[info.reason];
  const age = info.asOf === null ? "" : `${info.source}, ${info.ageSeconds} s ago\n`;
  return `${table}${isColoured ? `\x1b[1;${colour}m${verdict}\x1b[0m` : verdict}: ${info.message}\n${age}`;
}

/** The command `check`. */
async function check(given: World): Promise<number> {
  const world = prepareAccount(given);
  const { options, now, signal, print, isColoured } = world;
  hearSignals(world.stop, signal);
  const startedMs = now();
  const reading = mergeLook(UNSEEN, await createLook(world).look(() => {}));
  if (signal.aborted) throw new Error("The check was interrupted");
  const info = describe({ now: now(), reading, options, startedMs });
  await print(options.json ? `${JSON.stringify(info)}\n` : formatCheck(info, { now: now(), isColoured }));
  if (info.reason === "unknown") return EXIT.unavailable;
  return info.open ? EXIT.open : EXIT.closed;
}

/** MCP on stdin and stdout until the end of input; each call asks the running breaker. */
async function speakMcp({ options, now, lines, print }: World, address: Address): Promise<number> {
  const startedMs = now();
  const explainNone = (error: unknown): Info => {
    const unknown = describe({ now: now(), reading: UNSEEN, options, startedMs });
    return { ...unknown, open: true, message: messageOf(error), error: messageOf(error) };
  };
  for await (const line of lines) {
    const isLong = Buffer.byteLength(line) > MAX_MCP_LINE_BYTES;
    const question = isLong ? fail(undefined, { code: -32600, message: "Line Too Long" }) : readMcp(line);
    const info = question.needsLook ? await askInfo(address).catch(explainNone) : explainNone("");
    const reply = question.reply({ decide: () => info, describe: () => info });
    if (reply !== null) await print(`${reply}\n`);
    if (isLong) break;
  }
  return EXIT.closed;
}

/** Runs a command line and gives its exit code; never throws. */
export async function main(argv: string[], surroundings: Surroundings): Promise<number> {
  const controller = new AbortController();
  const { signal } = controller;
  const stop = () => controller.abort();
  try {
    const call = parseArguments(argv, surroundings.env);
    if (call.command === "print") {
      await surroundings.print(call.text);
      return EXIT.closed;
    }
    const { command, options, rest } = call;
    const world: World = { ...surroundings, options, stop, signal };
    // A breaker answers after its own --timeout at the latest.
    const address: Address = { ...options, timeoutMs: options.timeoutMs + 2 * SECOND };
    switch (command) {
      case "serve":
        return await serve(world);
      case "check":
        return await check(world);
      case "status": {
        const open = await askStatus(address);
        await world.print(open ? "TRUE\n" : "FALSE\n");
        return open ? EXIT.open : EXIT.closed;
      }
      case "stop":
        return await stopBreaker(address);
      case "exec":
        return await guard(rest, { world, address });
      case "mcp":
        return await speakMcp(world, address);
    }
  } catch (error) {
    surroundings.log(`breaker: ${redact(messageOf(error))}`);
    return error instanceof UsageError ? EXIT.usage : EXIT.unavailable;
  } finally {
    stop();
  }
}

const MAX_LOG_LINES = 1000;

/** Makes the function that writes lines to stderr and never waits: the disk may be full, the reader asleep. */
function createLog(): (text: string) => Promise<void> {
  const writer = Bun.stderr.writer();
  let waiting = 0;
  return async (text) => {
    if (waiting >= MAX_LOG_LINES) return;
    waiting++;
    try {
      writer.write(text);
      await writer.flush();
    } catch {} // Nobody is left to tell.
    waiting--;
  };
}

if (import.meta.main) {
  const write = createLog();
  const code = await main(Bun.argv.slice(2), {
    env: { ...process.env },
    now: Date.now,
    lines: console,
    print: (text) => Bun.write(Bun.stdout, text),
    log: (text) => void write(`${text}\n`),
    isColoured: isatty(1) && !process.env["NO_COLOR"],
  });
  await Promise.race([write(""), Bun.sleep(SECOND)]);
  process.exit(code);
}
