#!/usr/bin/env -S bun -i --no-env-file --config=/dev/null --tsconfig-override=/dev/null
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
 * It reads from top to bottom, first what is pure; importing it does nothing. The project's README.md says the rest.
 * @module
 */
import { write } from "node:fs";
import { basename } from "node:path";
import { setImmediate as nextRound } from "node:timers/promises";
import { isatty } from "node:tty";
import { parseArgs, promisify } from "node:util";
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
const resolveLocalhost = (host: string) => (host.toLowerCase() === "localhost" ? "127.0.0.1" : host);

const str = z.string();
const word = str.regex(/^[^\s\p{Cc}\p{Cf}]+$/u);

/** `"*-mini*,*-nano*=10M"` → `{ models: "*-mini*,*-nano*", limit: 10000000 }`, in tokens a UTC day. */
const allowance = word
  .regex(/^[^,=]+(,[^,=]+)*=[^=]+$/)
  .transform((text) => text.split("=", 2))
  .pipe(z.tuple([z.string(), scaled(/^\d+(\.\d+)?[kMG]?$/, { min: Number.MIN_VALUE })]))
  .transform(([models, limit]) => ({ models, limit: Number(limit.toPrecision(15)) })); // 2.007M is 2007000.0000000002.

// What an option may be: what that is called in --help, and what is expected where it is something else.
const TIME = { takes: "TIME", expects: "a duration from 1ms to 24h such as 500ms, 30s, 10m or 1h" };
const ADDRESS = { takes: "URL", expects: "an https URL (http only to this machine) without user, query and fragment" };
const PORT = { takes: "PORT", expects: "a port from 0 to 65535" };
const choice = z.enum(["true", "false"]).transform((value) => value === "true");
const truth = choice.meta({ takes: "true|false", expects: "true or false" });
const toggle = choice.meta({ expects: "true or false" });
const hostName = word.transform(resolveLocalhost).meta({ takes: "HOST", expects: "a host name or an address" });
const portNumber = scaled(/^\d{1,5}$/, { max: 65535 }).meta(PORT);
const maybePort = portNumber.or(z.literal("")).meta(PORT);
const usd = scaled(/^(\d+\.?\d*|\.\d+)$/).meta({ takes: "USD", expects: "an amount such as 0, 0.5 or 20" });
const time = scaled(/^\d+(ms|s|m|h)$/, { min: 1, max: DAY }).meta(TIME);
const sourceName = z.enum(["auto", "costs", "billing"]).meta({ takes: "NAME", expects: "auto, costs or billing" });
const entry = str.regex(/^(?!sk-\S{20})\P{Cc}*[^\p{Cc}\s/]$/u).meta({ takes: "NAME", expects: "the name in pass" });
const shellCommand = str.meta({ takes: "CMD", expects: "a shell command" });
const projects = z.array(str.regex(/^[\w-]+$/)).meta({ takes: "ID", expects: "a project ID such as proj_abc" });
const limits = z.array(allowance).meta({ takes: "MODELS=TOKENS", expects: "MODELS=TOKENS such as *-mini*=10M" });
/** An http URL sends the key in the clear: only to this machine. */
const apiUrl = z
  .url({ protocol: /^https?$/ })
  .regex(/^[^?#]*$/)
  .transform((href) => new URL(href))
  .transform((url) => Object.assign(url, { hostname: resolveLocalhost(url.hostname) }))
  .refine((url) => (url.protocol === "https:" || isLoopback(url.hostname)) && !url.username && !url.password)
  .transform(({ href }) => href.replace(/\/+$/, ""))
  .meta(ADDRESS);

/** Of each option: the flag, what counts where it is not given (and in a drill), and what it does. */
const OptionsSchema = z.object({
  host: hostName.meta({ flag: "host", fallback: "0.0.0.0", help: "where to listen, and where to ask" }),
  port: portNumber.meta({ flag: "port", fallback: "5555", help: "its port; 0 listens on any free one and logs it" }),
  thresholdUsd: usd.meta({ flag: "threshold", fallback: "0", help: "open when the two days cost more together" }),
  allowances: limits.meta({ flag: "allowance", help: "open when today's tokens reach this; repeatable" }),
  projects: projects.meta({ flag: "project", help: "count the costs of these projects only; repeatable" }),
  intervalMs: time.meta({ flag: "interval", fallback: "60s", inDrill: "1s", help: "between two looks at the account" }),
  timeoutMs: time.meta({ flag: "timeout", fallback: "10s", help: "for one request, its body included" }),
  maxAgeMs: time.meta({ flag: "max-age", fallback: "10m", help: "how long a good look counts" }),
  whenUnknown: truth.meta({ flag: "when-unknown", fallback: "true", help: "what unknown answers" }),
  source: sourceName.meta({ flag: "source", fallback: "auto", help: "auto is costs on openai.com, else billing" }),
  baseUrl: apiUrl.meta({ flag: "base-url", fallback: "https://api.openai.com/v1", help: "of the API" }),
  passEntry: entry.meta({ flag: "pass-entry", fallback: "OPENAI_API_KEY", help: "where pass keeps the key" }),
  onTrip: shellCommand.meta({ flag: "on-trip", help: "run by sh when the answer turns TRUE" }),
  onReset: shellCommand.meta({ flag: "on-reset", help: "run by sh when the answer turns FALSE" }),
  gateway: maybePort.meta({ flag: "gateway", help: "pass programs on to the API from this port of 127.0.0.1" }),
  drill: toggle.meta({ flag: "drill", fallback: "false", help: "a simulated account that costs a cent after 10 s" }),
  json: toggle.meta({ flag: "json", fallback: "false", help: "check prints the INFO object" }),
});

export type Options = z.output<typeof OptionsSchema>;
export type Env = Record<string, string | undefined>;

const some = str.default("");
/** A row of the table; an option that takes nothing is a switch. */
const RowSchema = z.object({ flag: str, takes: some, fallback: some, inDrill: some, help: str, expects: str });
const ROWS = Object.entries(OptionsSchema.shape).map(([key, schema]) => {
  return { ...RowSchema.parse(schema.meta()), key, schema, isRepeatable: schema instanceof z.ZodArray };
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
${line("-h, --help; -V, --version", "this text; the version")}

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
  for (const { key, schema, flag, isRepeatable, fallback, inDrill, expects } of ROWS) {
    const variable = `BREAKER_${flag.replaceAll("-", "_").toUpperCase()}`;
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

/** A command line and the environment → a command with its options, or a text to print. Throws a UsageError. */
export function parseArguments(argv: string[], env: Env) {
  const dashes = [...argv, "--"].indexOf("--");
  const [args, rest] = [argv.slice(0, dashes), argv.slice(dashes + 1)];
  if (args.includes("-h") || args.includes("--help")) return { command: "print" as const, text: formatHelp() };
  if (args.includes("-V") || args.includes("--version")) return { command: "print" as const, text: `${VERSION}\n` };

  const { flags, words } = readFlags(args);
  const [first = "serve", extra] = words;
  const options = readOptions(flags, env);
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
// Every byte from outside passes one of these, in linear time. Unknown members are left alone: OpenAI adds some.

const addUp = (sums: Record<string, number>) => Object.values(sums).reduce((total, amount) => total + amount, 0);

/** An amount: a finite number, or a string as OpenAI sends them live (`"0E-6176"`, `"0.1739150000000000"`). */
export const AmountSchema = z
  .union([z.number(), z.string().regex(/^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i)])
  .transform((value) => Number(raiseTiny(String(value)))) // Only zero is 0: what is tinier counts as 1e-300.
  .pipe(z.number().min(-1e15).max(1e15)); // So that no sum of them is infinite.
const TOKENS = /"[^"\\]*(?:\\[^][^"\\]*)*"?|-?[\d.]+(?:e[+-]?\d+)?/gi; // Of JSON: the texts, the numbers.
const raiseTiny = (token: string) => (Number(token) < 1e-300 && /^[+0.]*[1-9]/.test(token) ? "1e-300" : token);

/** `Date.UTC(2026, 10, 22, 23, 59)` → `"2026-11-22"` */
export function formatDay(ms: number): string {
  return new Date(ms).toISOString().slice(0, 10);
}

/** 00:00 UTC of a day, in Unix seconds from 2001 to 2286, so that milliseconds do not pass for a far day. */
const midnight = z.int().min(1e9).max(1e10).multipleOf(86400);
const DaySchema = midnight.transform((seconds) => formatDay(seconds * SECOND));
/** An object, not copied: it can have very many members. */
const JsonSchema = z.custom<Json>((json) => json instanceof Object && !Array.isArray(json), "expected an object");
type Json = Record<string, unknown>;
const ListSchema = z.array(z.unknown());
const RowsSchema = ListSchema.optional();
const INDEX = /"(?:\d|\\u003\d){1,5}"\s*:/; // A member named 999 makes an object a list of 1,000.
const isOver = (text: string, mark: RegExp, max: number) => text.length > max && text.split(mark, max).length >= max;

const [SEED] = crypto.getRandomValues(new Uint32Array(1)); // Nobody makes texts that meet in our table.
const SHORT = /^(?:[^\\]|\\(?:u....|[^u])){0,16}$/s; // Bun keeps these in a table of its own, and all names.

/** Whether texts may be compared over `max` times `max` times, where they are made to meet in Bun's table. */
function mayMeet(json: string, max: number): boolean {
  const pieces = json.replaceAll("\\\\", "\x01").replaceAll('\\"', "\x02").split('"', 1e6); // Each second is a text.
  const kept = pieces.filter((text, i) => i % 2 === 1 && (SHORT.test(text) || /^\s*:/.test(pieces[i + 1] ?? "")));
  return new Set(kept.map((text) => Number(Bun.hash(text, SEED)))).size * kept.length > max ** 2;
}

/** Parses JSON; undefined for a text that is none, or of too many members, lists, items or texts: `max` different ones. */
function parseJson(text: string, max = 5000): unknown {
  if (isOver(text, /:/, 100_000) || isOver(text, /[[{,]/, 400_000) || isOver(text, INDEX, 2000)) return undefined;
  if (isOver(text, /"/, 2 * max) && mayMeet(text, max)) return undefined;
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** A cost in usd. */
export const CostRowSchema = z
  .object({ amount: z.object({ value: AmountSchema, currency: z.string().regex(/^usd$/i).nullish() }) })
  .transform(({ amount }) => ({ amount: amount.value }));

const modelName = str.regex(/^[^]{0,256}$/); // A longer one would make globs slow; max() throws for some objects.

/** `input_tokens` holds the cached ones already. */
const tokenCount = z.int().min(0);
const InputSchema = z.object({ input_tokens: tokenCount, output_tokens: tokenCount });

/** Tokens of a model. */
export const UsageRowSchema = z
  .object({ ...InputSchema.shape, model: modelName.nullable() })
  .transform(({ model, ...tokens }) => ({ amount: addUp(tokens), model: model ?? "" }));

/** A UTC day of costs or of tokens. Older answers call `results` `result`. */
const BucketSchema = z
  .object({ start_time: DaySchema, end_time: z.number().default(0), results: RowsSchema, result: RowsSchema })
  .refine((bucket) => bucket.results ?? bucket.result, "expected results")
  .refine((bucket) => bucket.end_time * SECOND <= Date.parse(bucket.start_time) + DAY, "expected one day")
  .transform(({ start_time: day, results = [], result = [] }) => ({ day, rows: [...results, ...result] }));

const PageSchema = z
  .object({ object: z.literal("page").optional(), has_more: z.boolean(), next_page: z.string().nullish() })
  .refine((page) => page.has_more === Boolean(page.next_page), "expected next_page just where has_more is true");

/** A credit below 0 would hide a cost. */
const BillingSchema = z.object({ total_usage: AmountSchema.pipe(z.number().min(0)) });
const BillingDaySchema = z
  .object({ timestamp: DaySchema, line_items: ListSchema })
  .transform(({ timestamp: day, line_items: rows }) => ({ day, rows }));
const BillingItemSchema = z.object({ cost: AmountSchema }).transform(({ cost }) => ({ amount: cost / 100 }));

/** Never another machine's: exec has its command send requests there, with a key. */
const gatewayUrl = str.regex(/^http:\/\/127\.0\.0\.1:\d{1,5}\/v1$/);

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
  gateway: gatewayUrl.nullable().default(null).describe("what OPENAI_BASE_URL may be set to"),
  version: z.string(),
  pid: z.int().positive(),
  startedAt: z.string(),
});

export type Info = z.output<typeof InfoSchema>;

const PromptSchema = z.object({ prompt_tokens: tokenCount, completion_tokens: tokenCount.default(0) });
const tokenSum = z.union([InputSchema, PromptSchema]).transform(addUp).nullable().catch(null);
const moment = z.number().min(1e9).max(1e10).optional().catch(undefined);
/** The shape that the Usage API counts as completions: whose tokens, how many (null: not told), made when. */
const SpentSchema = z.object({ id: str, model: modelName, usage: tokenSum, created: moment, created_at: moment });
const nameless = { object: z.literal("response.compaction"), model: modelName.default("compaction") };
const ResponseEventSchema = z.object({ response: SpentSchema }).transform(({ response }) => response);
/** What an answer, or an event of one, tells of the tokens that it has spent. */
export const AnswerSchema = z.union([SpentSchema, SpentSchema.extend(nameless), ResponseEventSchema]);
type Spending = z.output<typeof AnswerSchema>;

/** The one event that a chat stream adds when it is asked for its usage. */
const UsageEventSchema = z.object({ choices: z.tuple([]), usage: z.object({}) });
const StreamRequestSchema = z.object({ stream: z.literal(true), stream_options: JsonSchema.nullish() });

// ── Money and time ──────────────────────────────────────────────────────────────────────────────

/** The UTC days before, at and after `now`: yesterday, today and tomorrow. */
export function listDays(now: number): { yesterday: string; today: string; tomorrow: string } {
  return { yesterday: formatDay(now - DAY), today: formatDay(now), tomorrow: formatDay(now + DAY) };
}

/** `0.1 + 0.2` → `"0.3"`: what a person reads, never 0 for a cost. */
export function formatAmount(amount: number): string {
  return String(Number(amount.toPrecision(12)));
}

/** Tells of a model's name whether it fits `patterns`: `matchModels("*-mini*,o?")("gpt-4o-mini-2024-07-18")` → true */
export function matchModels(patterns: string): (model: string) => boolean {
  const globs = patterns.split(",").map(toRegExp);
  return (model) => globs.some((glob) => glob.test(model));
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

/** Makes text from outside fit for a log line: no control characters, no key, no secret, at most 300 characters. */
export function redact(text: string, secrets: string[] = []): string {
  const visible = text.slice(0, 2000).replace(/\p{Cf}/gu, "");
  const known = secrets.reduce((rest, secret) => rest.replaceAll(secret, "sk-***"), visible);
  const clean = known.replace(/[\p{Cc}\u2028\u2029]+/gu, " ").replace(/\bsk-\S+|sk-\S{20,}/g, "sk-***");
  return clean.length > 300 ? `${clean.slice(0, 300)}…` : clean;
}

// ── The account's answers ───────────────────────────────────────────────────────────────────────
// Each item is read by itself: a cost that was seen counts also where its neighbour cannot be read.

/** A cost in usd, or tokens where there is a model's name, of a UTC day. */
export type Entry = { day: string; amount: number; model?: string };

/** What an answer holds: `next` is the cursor of the next page, `problem` why the look has failed. */
export type Page = { entries: Entry[]; next: string | null; problem: string | null };

const MAX_PROBLEMS = 10; // A page of 1 MiB can hold so many bad rows that to explain them all takes seconds.

const explain = ({ issues: [issue] }: z.ZodError) => `${issue?.path.join(".") || "the answer"}: ${issue?.message}`;

/** The items of a list that fit; what is wrong with the others, or with the list, goes to `problems`. */
function readEach<T>(list: unknown, { schema, problems }: { schema: z.ZodType<T>; problems: string[] }): T[] {
  const found: T[] = [];
  const items = ListSchema.safeParse(list);
  if (!items.success) problems.push(`a list: ${explain(items.error)}`);
  for (const item of items.data ?? []) {
    if (problems.length >= MAX_PROBLEMS) break;
    const read = schema.safeParse(item);
    if (read.success) found.push(read.data);
    else problems.push(explain(read.error));
  }
  return found;
}

type RowReader = z.ZodType<Omit<Entry, "day">>;
type DayReader = z.ZodType<{ day: string; rows: unknown[] }>;

function readDays(list: unknown, how: { days: DayReader; rows: RowReader; problems: string[] }): Entry[] {
  const days = readEach(list, { ...how, schema: how.days });
  return days.flatMap(({ day, rows }) => readEach(rows, { ...how, schema: how.rows }).map((row) => ({ day, ...row })));
}

/** Reads a page of the Costs or the Usage API. */
export function readPage(body: unknown, rows: RowReader): Page {
  const problems: string[] = [];
  const { data } = JsonSchema.safeParse(body).data ?? {};
  const entries = readDays(data, { days: BucketSchema, rows, problems });
  const [envelope] = readEach([body], { schema: PageSchema, problems });
  return { entries, next: envelope?.next_page || null, problem: problems[0] ?? null };
}

/** Reads the billing endpoint's answer, in fractional cents; a total above the sum of its days is booked on `today`. */
export function readBilling(body: unknown, today: string): Page {
  const problems: string[] = [];
  const { daily_costs } = JsonSchema.safeParse(body).data ?? {};
  const entries = readDays(daily_costs ?? [], { days: BillingDaySchema, rows: BillingItemSchema, problems });
  const [envelope] = readEach([body], { schema: BillingSchema, problems });
  const total = (envelope?.total_usage ?? 0) / 100; // Relays send nothing but this.
  const rest = total - entries.reduce((sum, { amount }) => sum + amount, 0);
  if (rest > total * 1e-12) entries.push({ day: today, amount: rest }); // Less is the rounding of the sum.
  if (rest < total * -1e-12) problems.push("total_usage: expected the sum of daily_costs, or more");
  return { entries, next: null, problem: problems[0] ?? null };
}

// ── The decision ────────────────────────────────────────────────────────────────────────────────

/** Costs in usd by UTC day (`"2026-11-22"`), and tokens by day and allowance (`"2026-11-22 *-mini*"`). */
export type Sums = Record<string, number>;

/** What is known: when the last good look began (ms since 1970), sums, why the last look failed, its Retry-After. */
export type Reading = { asOfMs: number | null; sums: Sums; error: string | null; retryAfterMs: number };

/** A reading at `now` (ms since 1970), under the user's options. */
export type Moment = { now: number; reading: Reading; options: Options };

export type Self = { startedMs: number; gateway: string | null; keys: string[] }; // That were read, the newest first.

export const UNSEEN: Reading = { asOfMs: null, sums: {}, error: null, retryAfterMs: 0 };

const nameSum = (day: string, models = "") => (models ? `${day} ${models}` : day);

/** `sums` with `entries`. A credit (below 0) hides no cost; a model counts toward the first allowance that fits it. */
export function addEntries(sums: Sums, entries: Entry[], { now, options }: Omit<Moment, "reading">): Sums {
  const added = { ...sums };
  const { yesterday, tomorrow } = listDays(now);
  const allowances = options.allowances.map(({ models }) => ({ models, matches: matchModels(models) }));
  for (const { day, amount, model } of entries) {
    const limit = allowances.find(({ matches }) => model !== undefined && matches(model));
    if (day < yesterday || (model !== undefined && !limit)) continue;
    const name = nameSum(day > tomorrow ? tomorrow : day, limit?.models); // So that there are few, whatever comes.
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

/** A good look replaces the reading; a failed one can only raise it, or end its time where the clock was wrong. */
export function mergeLook({ asOfMs, sums }: Reading, look: Reading): Reading {
  return look.error === null ? look : { ...look, asOfMs: look.asOfMs && asOfMs, sums: raiseSums(sums, look.sums) };
}

/** The days from `first` on and their sums: of costs, or of an allowance. A clock that is behind hides no day. */
function listSince(first: string, { sums, models }: { sums: Sums; models?: string }): Sums {
  const days = Object.keys(sums).filter((name) => name >= first && name === nameSum(name.slice(0, 10), models));
  return Object.fromEntries(days.sort().map((name) => [name.slice(0, 10), sums[name] ?? 0]));
}

/** The allowances, and the tokens of today that count toward each; null before a good look. */
function listAllowances({ now, reading: { sums, asOfMs }, options }: Moment): Info["allowances"] {
  return options.allowances.map(({ models, limit }) => {
    const used = addUp(listSince(listDays(now).today, { sums, models }));
    return { models, used: used === 0 && asOfMs === null ? null : used, limit };
  });
}

/** What a reading means at `now`. The order is the contract: a cost that was seen wins. */
export function decide(moment: Moment): Pick<Info, "open" | "reason" | "message"> {
  const { now, options } = moment;
  const { asOfMs, sums, error } = moment.reading;
  const { yesterday, today } = listDays(now);
  const days = listSince(yesterday, { sums });
  const total = addUp(days);
  if (total > options.thresholdUsd) {
    const parts = Object.entries(days).flatMap(([day, sum]) => (sum > 0 ? `${formatAmount(sum)} usd on ${day}` : []));
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
  const cause = asOfMs === null ? "no good look at the account yet" : `the last good look is ${ageSeconds} s old`;
  return { open: options.whenUnknown, reason: "unknown", message: [cause, error ?? []].flat().join(": ") };
}

/** The INFO object of a reading at `now`. */
export function describe({ startedMs, gateway, ...moment }: Moment & Omit<Self, "keys">): Info {
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
    gateway,
    version: VERSION,
    pid: process.pid,
    startedAt: new Date(startedMs).toISOString(),
  };
}

// ── The protocol ────────────────────────────────────────────────────────────────────────────────
// One connection, one question: a line finds its row in this table.

/** What is asked, by a line or by MCP: its answer (null where none is due), and whether that rests on a look. */
export type Question = { reply: (info: Info) => string | null; needsLook?: true };

/** A line that is a question; some tell amounts, and are for this machine only. */
type LineCommand = Question & { name: string; help: string; localOnly?: true };

const STATUS_HELP = "TRUE when the account incurred a cost today or yesterday (UTC) or that is not known, else FALSE";
const INFO_HELP = "reason, amounts and age as a line of JSON, for this machine only";

export const LINE_COMMANDS: LineCommand[] = [
  { name: "STATUS", help: STATUS_HELP, needsLook: true, reply: ({ open }) => (open ? "TRUE" : "FALSE") },
  { name: "HELP", help: "this list", reply: () => HELP },
  { name: "INFO", help: INFO_HELP, needsLook: true, localOnly: true, reply: (info) => JSON.stringify(info) },
];

const HELP = [
  ...LINE_COMMANDS.map(({ name, help }) => `${name.padEnd(6)} ${help}`),
  "{      begins a message of the Model Context Protocol, one a line, for this machine only",
].join("\n");

const answerWith = (text: string | null): Question => ({ reply: () => text });

/** Finds what a line asks for: `findQuestion(" status\r", { isLocal: () => false })` → the row of STATUS */
export function findQuestion(line: string, { isLocal }: { isLocal: () => boolean }): Question {
  const [, word = ""] = /^[ \t\r]*([a-z]+)[ \t\r]*$/i.exec(line) ?? [];
  const found = LINE_COMMANDS.find(({ name }) => name === word.toUpperCase());
  return found?.localOnly && !isLocal() ? answerWith("ERR Not Allowed") : (found ?? answerWith("ERR Unknown Command"));
}

const MAX_LINE_BYTES = 256;
const MAX_MCP_LINE_BYTES = 64 * 1024;

/** Cuts the first line off `input`; at the end of the input an unfinished one counts as a line. */
export function takeLine(input: Buffer, { ended, limit }: { ended: boolean; limit: number }) {
  const newline = input.indexOf(10);
  const end = newline < 0 ? input.length : newline;
  if (end - (input[end - 1] === 13 ? 1 : 0) > limit) return "too long";
  if (newline < 0 && !ended) return "incomplete";
  return { line: input.toString("utf8", 0, end), rest: input.subarray(end + 1) };
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
  "breaker_status. If open is true, stop spending, tell the person why, and do not retry. " +
  "The reason unknown means that the costs cannot be read, which is no permission to spend.";
const TOOL = "breaker_status";
const VERSION_KEY = `${META}protocolVersion`;
const CAPABILITIES_KEY = `${META}clientCapabilities`;

const IdSchema = z.union([z.string(), z.int()]);
const MessageSchema = z.object({ jsonrpc: z.literal("2.0"), method: z.string(), params: z.unknown().optional() });
const MetaSchema = z.object({ [VERSION_KEY]: z.string(), [CAPABILITIES_KEY]: JsonSchema });

const { $schema: _, ...outputSchema } = z.toJSONSchema(InfoSchema.omit({ pid: true }));
const TOOL_LISTING = {
  name: TOOL,
  title: "OpenAI cost breaker",
  description: `Tells whether this OpenAI account incurred a cost today or yesterday (UTC). ${INSTRUCTIONS}`,
  inputSchema: { type: "object", additionalProperties: false },
  outputSchema,
  annotations: { readOnlyHint: true, openWorldHint: false },
};

function formatStatus({ pid: _, ...status }: Info): Json {
  return { content: [{ type: "text", text: JSON.stringify(status) }], structuredContent: status };
}

function answerError(id: string | number | undefined, error: { code: number; message: string; data?: Json }): Question {
  return answerWith(JSON.stringify({ jsonrpc: "2.0", id, error }));
}

/** What one line of MCP asks for, a bad one too. */
export function readMcp(line: string): Question {
  if (!line.trim()) return answerWith(null);
  const json = parseJson(line, 256);
  if (json === undefined) return answerError(undefined, { code: -32700, message: "Not JSON, or of too many names" });
  const envelope = JsonSchema.safeParse(json).data ?? {};
  const id = IdSchema.safeParse(envelope["id"]).data;
  const message = MessageSchema.safeParse(json);
  if (!message.success) {
    if ("result" in envelope || "error" in envelope) return answerWith(null);
    return answerError(id, { code: -32600, message: "Not a request of JSON-RPC 2.0" });
  }
  if (!("id" in envelope)) return answerWith(null); // A notification.
  if (id === undefined) return answerError(id, { code: -32600, message: "id: expected a string or an integer" });
  const params = JsonSchema.safeParse(message.data.params ?? {}).data;
  const meta = JsonSchema.safeParse(params?.["_meta"] ?? {}).data;
  if (!params || !meta) return answerError(id, { code: -32602, message: "params: expected an object, its _meta too" });
  const requested = meta[VERSION_KEY];
  if (typeof requested === "string" && requested !== MODERN_VERSION) {
    const data = { supported: [MODERN_VERSION], requested };
    return answerError(id, { code: -32022, message: "Unsupported protocol version", data });
  }
  const modern = VERSION_KEY in meta || CAPABILITIES_KEY in meta;
  const incomplete = modern ? MetaSchema.safeParse(meta).error : null;
  if (incomplete) return answerError(id, { code: -32602, message: `_meta.${explain(incomplete)}` });
  return readRequest(id, { method: message.data.method, params, modern });
}

function readRequest(id: string | number, call: { method: string; params: Json; modern: boolean }): Question {
  const { method, params, modern } = call;
  const invalid = (message: string) => answerError(id, { code: -32602, message });
  const envelope = modern ? { resultType: "complete", _meta: { [`${META}serverInfo`]: SERVER_INFO } } : {};
  const cached = modern ? { ttlMs: HOUR, cacheScope: "public" } : {};
  const format = (result: Json) => JSON.stringify({ jsonrpc: "2.0", id, result: { ...result, ...envelope } });
  const succeed = (result: Json) => answerWith(format(result));
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
      const about = { _meta: { [`${META}subscriptionId`]: id }, notifications: {} };
      const method = "notifications/subscriptions/acknowledged";
      return answerWith(JSON.stringify({ jsonrpc: "2.0", method, params: about }));
    }
    case "modern tools/list":
    case "handshake tools/list":
      if (params["cursor"] !== undefined) return invalid("cursor: expected none, the list has one page");
      return succeed({ tools: [TOOL_LISTING], ...cached });
    case "modern tools/call":
    case "handshake tools/call":
      if (params["name"] !== TOOL) return invalid(`name: expected ${TOOL}, the only tool`);
      return { needsLook: true, reply: (info) => format(formatStatus(info)) };
    default:
      return answerError(id, { code: -32601, message: "No such method" });
  }
}

// ── Passing on ──────────────────────────────────────────────────────────────────────────────────
// What the gateway makes of bodies, which are latin1 here: one letter a byte, so that nothing is cut inside a letter.

/** Finds the complete events of a stream with their blank lines, and further ones: `"a\n\n\nb"` → `"a\n\n"`, `"\n"` */
export const EVENTS = /[\r\n]*\n|[^]*?\n\r?\n/gy;

/** The JSON of a body, or of the `data` of an event (no line of JSON begins so); undefined where it holds none. */
export function readJson(text: string): unknown {
  const lines = text.match(/(?<=^data:).*/gm) ?? [text];
  const json = Buffer.from(lines.join("\n"), "latin1").toString();
  return parseJson(json.replace(/"token":\s*"[^"\\]{0,16}"/g, '"token":0')); // Of logprobs: many, and different.
}

/**
 * A request for a stream with the wish for its usage spliced in; null where it needs none:
 * `{"stream":true}` → `{"stream_options":{"include_usage":true},"stream":true}`
 */
export function askForUsage(body: string): string | null {
  const request = StreamRequestSchema.safeParse(parseJson(body)).data;
  if (!request || request.stream_options?.["include_usage"]) return null;
  const wish = (old: unknown) => `"stream_options":${JSON.stringify(Object.assign({}, old, { include_usage: true }))}`;
  if (request.stream_options === undefined) return body.replace("{", () => `{${wish(null)},`);
  const [before = "", after = "", ...more] = body.split(/"stream_options"\s*:/); // Where there are two, one is nested.
  const [found, old = ""] = /^\s*(null|\{("[^"{}\\]*"|[^"{}\\]){0,999}\})/.exec(after) ?? [];
  return !found || more.length > 0 ? null : before + wish(parseJson(old)) + after.slice(found.length);
}

/** Headers that are about a connection, not about what it carries (RFC 9110, section 7.6.1). */
const HOP_BY_HOP = "connection,keep-alive,proxy-connection,proxy-authenticate,proxy-authorization,te,trailer,upgrade";

/** The headers to pass on: not those of this connection, nor what `Connection` names. */
export function passHeaders(headers: Headers): Headers {
  const passed = new Headers(headers);
  const names = `${HOP_BY_HOP},transfer-encoding,host,expect,${headers.get("connection") ?? ""}`;
  const dropped = new Set(names.toLowerCase().split(/[\s,]+/));
  for (const name of [...passed.keys()]) if (dropped.has(name)) passed.delete(name);
  return passed;
}

const REFUSALS = { not_allowed: 403, not_found: 404, no_websocket: 426, breaker_open: 403, upstream_failed: 502 };

/** A refusal in OpenAI's shape of an error, so that every client shows the message; only 502 may be tried again. */
function refuse(code: keyof typeof REFUSALS, message: string): Response {
  const headers = code === "upstream_failed" ? {} : { "x-should-retry": "false" };
  return Response.json({ error: { message, type: code, param: null, code } }, { status: REFUSALS[code], headers });
}

/** Refuses what no program of this machine asks: a web page must neither spend nor read. Null for what may pass. */
export function screen({ url, headers }: Pick<Request, "url" | "headers">, port: number): Response | null {
  const isFromPage = headers.has("origin") || headers.has("sec-fetch-site");
  const hosts = ["127.0.0.1", "localhost", "[::1]"].map((name) => (port === 80 ? name : `${name}:${port}`));
  if (isFromPage || !hosts.includes(headers.get("host")?.toLowerCase() ?? "")) {
    return refuse("not_allowed", "This gateway is for programs on this machine, not for web pages");
  }
  const isBase = /^http:\/\/[^/]*\/v1\//.test(url) && new URL(url).pathname.startsWith("/v1/"); // Even of a CONNECT.
  if (!isBase) return refuse("not_found", `The base URL of this gateway is http://127.0.0.1:${port}/v1`);
  const isSocket = headers.get("upgrade")?.toLowerCase() === "websocket";
  return isSocket ? refuse("no_websocket", "This gateway speaks no WebSocket; use HTTP") : null;
}

// ── Effects: child processes and the key ────────────────────────────────────────────────────────

/** What the program has around it; a test brings its own. `now` is the wall clock, in ms since 1970. */
export interface Surroundings {
  env: Env;
  now: () => number;
  /** Stdin by lines, text to stdout as it is (a terminal may want colours), and a line to stderr. */
  lines: AsyncIterable<string>;
  print: (text: string) => Promise<unknown>;
  isColoured: boolean;
  log: (text: string) => void;
}

/** What a command works with: also the words after `--`. */
export interface World extends Surroundings {
  options: Options;
  rest: string[];
  self: Self;
  /** Ends the command in good order, and aborts `signal`: nothing that was started outlives it. */
  stop: () => void;
  signal: AbortSignal;
}

/** How long a peer that makes no progress gets, a breaker that is gone, and a command that was told to end. */
const PATIENCE_MS = 10 * SECOND;
const MAX_READ_BYTES = 1024 * 1024;

const ADDED = /(\. For more | fetching "|(?<=tunnel: \d+) ).*/s; // By Bun: advice, the account's cursor, a proxy's words.
const isSecret = ({ length }: string) => length >= 8; // What is shorter stands in many a text.

const messageOf = (error: unknown) => (error instanceof Error ? error.message.replace(ADDED, "") : String(error));

/** Waits as long as something holds, `limitMs` at most; false where it still holds then. */
async function waitWhile(holds: () => boolean, limitMs = Infinity, pauseMs = () => 50): Promise<boolean> {
  const endMs = performance.now() + limitMs;
  while (holds() && performance.now() < endMs) await Bun.sleep(pauseMs());
  return !holds();
}

/** All bytes of a stream; throws where there are more than 1 MiB. */
async function readAll(stream: ReadableStream<Uint8Array>): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  let left = MAX_READ_BYTES;
  for await (const chunk of stream) {
    if ((left -= chunk.byteLength) < 0) throw new Error("it is over 1 MiB");
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

/** The environment of a child: without the key, by its name or by its value. */
function childEnv({ env: { OPENAI_ADMIN_KEY, ...env }, self }: Pick<World, "env" | "self">): Env {
  const keys = [OPENAI_ADMIN_KEY?.split("\n", 1).join().trim() ?? "", ...self.keys].filter(isSecret);
  return Object.fromEntries(Object.entries(env).filter(([, value]) => !keys.some((key) => value?.includes(key))));
}

/** Sends a signal, to a whole group where `pid` is negative; false where it cannot be sent. */
function kill(pid: number, signal: NodeJS.Signals | 0): boolean {
  try {
    return process.kill(pid, signal);
  } catch {
    return false;
  }
}

/** Lets `hear` have the signals that end a command, or that it makes something of, until `end`. */
function hearSignals(hear: (name: NodeJS.Signals) => void, end: AbortSignal): void {
  for (const name of ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2"] as const) {
    process.on(name, hear);
    end.addEventListener("abort", () => process.off(name, hear));
  }
}

type Run = { env: Env; signal: AbortSignal; input?: string; limitMs?: number };

/** Runs a program in its own process group; gives its output and exit code. Throws where it is killed with that. */
export async function runProgram(argv: string[], { env, signal, input = "", limitMs = 30 * SECOND }: Run) {
  signal.throwIfAborted();
  const child = Bun.spawn(argv, { env, stdin: Buffer.from(input), stdout: "pipe", stderr: "pipe", detached: true });
  const cut = Promise.withResolvers<never>();
  const limit = AbortSignal.any([signal, AbortSignal.timeout(limitMs)]);
  limit.addEventListener("abort", () => cut.reject(new Error(`it took longer than ${limitMs / SECOND} s`)));
  try {
    const ended = Promise.all([child.exited, readAll(child.stdout), readAll(child.stderr)]);
    const [code, stdout, stderr] = await Promise.race([ended, cut.promise]);
    return { code, stdout: stdout.toString(), stderr: stderr.toString() };
  } catch (error) {
    kill(-child.pid, "SIGKILL");
    throw signal.aborted ? new Error("the breaker was stopped") : error;
  }
}

/** The key: OPENAI_ADMIN_KEY, else the first line of `pass show -- ENTRY`; throws an Error that says what to do. */
async function readKey({ options: { passEntry: entry, drill }, self, env, signal }: World): Promise<string> {
  if (drill) return "drill";
  const given = env["OPENAI_ADMIN_KEY"];
  const pass = given ? null : runProgram(["pass", "show", "--", entry], { env: childEnv({ env, self }), signal });
  const shown = await pass?.catch((error) => ({ code: null, stdout: "", stderr: messageOf(error) }));
  if (shown && shown.code !== 0) {
    const store = `store an admin key with: pass insert ${entry} (or set OPENAI_ADMIN_KEY)`;
    const advice = `install pass, ${store}, or unlock it once in a terminal with: pass show ${entry}`;
    const cause = redact(shown.stderr.trim(), self.keys) || `exit code ${shown.code}`;
    throw new Error(`pass show ${entry} failed, ${cause}; ${advice}`);
  }
  const line = (given || shown?.stdout || "").split("\n", 1).join().trim();
  if (/^[\x21-\x7e]+$/.test(line) && line !== entry) return line; // Of a folder, pass prints name and tree.
  const place = given ? "OPENAI_ADMIN_KEY" : `the first line of ${entry} in pass`;
  throw new Error(`${place} does not look like a key; put an admin key there`);
}

// ── Effects: the look ───────────────────────────────────────────────────────────────────────────

const tls = { rejectUnauthorized: true };
/** Of every request: nothing is decompressed, followed, ended by Bun, printed, or taken from who proves no name. */
const ON_WIRE = { decompress: false, redirect: "manual", timeout: false, verbose: false, tls } as const;
const MAX_PAGES = 20;

type Endpoint = { what: string; path: string; read: (body: unknown) => Page }; // A list of pages; `path` has a query.

function listEndpoints(options: Options, now: number): Endpoint[] {
  const { yesterday, today, tomorrow } = listDays(now);
  if (resolveSource(options) === "billing") {
    const path = `/dashboard/billing/usage?start_date=${yesterday}&end_date=${tomorrow}`;
    return [{ what: "the billing usage", path, read: (body) => readBilling(body, today) }];
  }
  const daysFrom = (start: string) => `start_time=${Date.parse(start) / SECOND}&bucket_width=1d&limit=31`;
  const projects = options.projects.map((id) => `&project_ids%5B%5D=${encodeURIComponent(id)}`).join("");
  const path = `/organization/costs?${daysFrom(yesterday)}${projects}`;
  const costs: Endpoint = { what: "the costs", path, read: (body) => readPage(body, CostRowSchema) };
  if (options.allowances.length === 0) return [costs];
  const usage = `/organization/usage/completions?${daysFrom(today)}&group_by%5B%5D=model`;
  return [costs, { what: "the token usage", path: usage, read: (body) => readPage(body, UsageRowSchema) }];
}

/** What to do about an answer with another status than 200. */
function advise(status: number, options: Options): string {
  if (status >= 300 && status < 400) return "a redirect is not followed, set --base-url to where it leads";
  if (status === 404) return "check --base-url and --source";
  if (status !== 401 && status !== 403) return "the next look comes by itself";
  if (resolveSource(options) === "billing") return "check the key; api.openai.com wants --source costs";
  const create = "create an admin key with the scope api.usage.read at";
  const store = `and run: pass insert ${options.passEntry} (or set OPENAI_ADMIN_KEY)`;
  return `${create} https://platform.openai.com/settings/organization/admin-keys ${store}`;
}

const failToReach = (error: unknown) =>
  Promise.reject(new Error(`${redact(messageOf(error))}; check the network and --base-url`));

/** Reads a good answer, and throws for any other. Nothing that the account says is repeated: it may quote the key. */
async function readAnswer({ status, headers, body }: Response, { options, now, look }: World & { look: Reading }) {
  const date = headers.get("date");
  if (date !== null && !(Math.abs(Date.parse(date) - now()) <= 10 * MINUTE)) {
    look.asOfMs = null;
    throw new Error("the answer's Date is more than 10 minutes off; set this machine's clock");
  }
  if (status !== 200) throw new Error(`HTTP ${status}; ${advise(status, options)}`);
  const encoding = headers.get("content-encoding") ?? "identity";
  if (encoding !== "identity") throw new Error("the answer is compressed, though asked for as is; check --base-url");
  if (!(Number(headers.get("age")) <= 60)) throw new Error("the answer lay in a cache for a minute; check --base-url");
  const bytes = await readAll(body ?? new Blob([]).stream()).catch(failToReach);
  const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  const json = await takeTurn(() => parseJson(text.replace(TOKENS, raiseTiny)));
  if (json === undefined) throw new Error("the answer is not JSON; check --base-url");
  const { error } = JsonSchema.safeParse(json).data ?? {};
  if (error !== undefined && error !== null) throw new Error("the answer is an error with HTTP 200; check --base-url");
  return json;
}

/** Reads a list to its end: `ask` takes what to add to the query for a page, and gives the cursor of the next. */
async function readPages(ask: (query: string) => Promise<string | null>): Promise<void> {
  const cursors = new Set<string>();
  for (let query = ""; cursors.size < MAX_PAGES;) {
    const next = await ask(query);
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
  const { options, self, now, signal } = world;
  let key: Promise<string> | null = null;
  const forgetKey = () => void (key = null);

  async function request(path: string, { secret, look }: { secret: string | void; look: Reading }): Promise<unknown> {
    const response = await fetch(`${options.baseUrl}${path}`, {
      headers: { authorization: `Bearer ${secret}`, "accept-encoding": "identity", "cache-control": "no-cache" },
      ...ON_WIRE,
      keepalive: false,
      signal: AbortSignal.any([signal, AbortSignal.timeout(options.timeoutMs)]),
    }).catch(failToReach);
    if (response.status === 401 || response.status === 403) forgetKey();
    look.retryAfterMs = Math.max(look.retryAfterMs, parseRetryAfter(response.headers.get("retry-after"), now()));
    return readAnswer(response, { ...world, look });
  }

  async function look(onSeen: (sums: Sums) => void): Promise<Reading> {
    const beganMs = now();
    const { yesterday, today } = listDays(beganMs);
    // A good look is complete: a day without a row had no cost.
    const names = [yesterday, today, ...options.allowances.map(({ models }) => nameSum(today, models))];
    const look: Reading = { ...UNSEEN, asOfMs: beganMs, sums: Object.fromEntries(names.map((name) => [name, 0])) };
    const note = (what: string) => (error: unknown) => void (look.error ??= `Cannot read ${what}: ${messageOf(error)}`);
    const secret = await (key ??= readKey(world)).catch(note("the key"));
    if (!secret) forgetKey();
    else self.keys = [...new Set([secret, ...self.keys])];
    const reads = listEndpoints(options, beganMs).map(({ what, path, read }) => {
      const ask = async (query: string) => {
        const body = await request(path + query, { secret, look });
        const { entries, next, problem } = await takeTurn(() => read(body)); // 1 MiB of rows is much.
        onSeen((look.sums = addEntries(look.sums, entries, { now: beganMs, options })));
        if (problem !== null) throw new Error(`${problem}; check --base-url and --source`);
        return next;
      };
      return secret ? readPages(ask).catch(note(what)) : null;
    });
    await Promise.all(reads);
    return look;
  }

  return { look, forgetKey };
}

// ── Effects: the watch ──────────────────────────────────────────────────────────────────────────
// One timer and one look at a time, whoever asks: every answer comes from the reading in memory.

/** Looks on and on; `onAnswer` hears every answer that rests on a look. */
export function startWatch(world: World, { look, onAnswer }: { look: Look; onAnswer: (info: Info) => void }) {
  const { options, self, now, signal } = world;
  let leadMs = now() - performance.now();
  /** What the gateway has counted, and what is known with it: name by name the larger. */
  let live: Sums = {};
  let reading = UNSEEN;
  let described: { atMs: number; info: Info } | null = null;
  /** Whether a look has ended that began since the clocks last jumped apart. */
  let hasLooked = false;
  /** What questions wait for before the answers are settled, `--timeout` at most; null when the wait is over. */
  let wait: PromiseWithResolvers<void> | null = null;
  let alarm = Promise.withResolvers<void>();

  function beginWait(): void {
    hasLooked = false;
    const begun = (wait ??= Promise.withResolvers<void>());
    setTimeout(begun.resolve, options.timeoutMs);
    void begun.promise.then(() => begun === wait && (wait = null));
  }

  function learn(next: Reading): void {
    reading = { ...next, sums: raiseSums(next.sums, live) };
    described = null;
  }

  /** INFO as of now, made once for all who ask within the same millisecond. */
  function describeNow(): Info {
    const atMs = now();
    if (described?.atMs !== atMs) described = { atMs, info: describe({ now: atMs, reading, options, ...self }) };
    return described.info;
  }

  /** Where wall and monotonic clock move apart, one was set, or all slept. */
  function noticeJump(): void {
    const movedMs = now() - performance.now() - leadMs;
    if (Math.abs(movedMs) <= Math.min(10 * SECOND, Math.max(100, options.maxAgeMs / 10))) return; // 100 is jitter.
    leadMs += movedMs;
    // By a clock that was set back, nobody can tell how old the last good look is.
    if (movedMs < 0) learn({ ...reading, asOfMs: null, error: "this machine's clock was set back; wait for a look" });
    beginWait();
    alarm.resolve();
  }

  /** To be called every second: age and midnight change the answer without a look. */
  function tick(): void {
    noticeJump();
    if (hasLooked && !signal.aborted) onAnswer(describeNow());
  }

  async function keepLooking(): Promise<void> {
    for (let failures = 0; ;) {
      await alarm.promise.then(noticeJump);
      if (signal.aborted) return;
      alarm = Promise.withResolvers();
      const before = { leadMs, key: self.keys[0] };
      const found = await look((seen) => learn({ ...reading, sums: raiseSums(reading.sums, seen) }));
      noticeJump();
      if (self.keys[0] !== before.key) learn({ ...reading, asOfMs: null }); // It may be another account's.
      if (leadMs === before.leadMs) {
        learn(mergeLook(reading, found));
        hasLooked = true;
        wait?.resolve();
      }
      tick();
      failures = found.error === null ? 0 : failures + 1;
      setTimeout(alarm.resolve, failures > 0 ? computeBackoff(failures, { ...options, ...found }) : options.intervalMs);
    }
  }

  signal.addEventListener("abort", () => [alarm, wait].forEach((awaited) => awaited?.resolve()));
  beginWait();
  void keepLooking();
  return {
    describe: describeNow,
    tick,
    /** Counts tokens that were seen to be spent, and trips at once. */
    count(entry: Entry): void {
      live = addEntries(live, [entry], { now: now(), options });
      learn(reading);
      tick();
    },
    /** Looks now, or once more where a look is under way; the first call starts the watch. */
    hurry: () => alarm.resolve(),
    /** Notices a jump of the clock; resolves when a question can be answered, null when it can be now. */
    whenSettled(): Promise<void> | null {
      noticeJump();
      return wait?.promise ?? null;
    },
  };
}

// ── Effects: the server ─────────────────────────────────────────────────────────────────────────

export type Watch = ReturnType<typeof startWatch>;
const MAX_CONNECTIONS = 1024;
/** How much is read, or answered, in turns of their own, and what may be held of all peers, unread or unsent. */
const TURN = { ms: 10, lines: 256, bytes: 64 * 1024 };
const MAX_HELD_BYTES = 16 * 1024 * 1024;
const twoRounds = () => nextRound().then(() => nextRound()); // One takes a connection on, the next its question.

/** The turns of all, one after another, and when those of this round of the event loop end, ms on the monotonic clock. */
let [turns, turnsEndMs]: [Promise<unknown>, number] = [Promise.resolve(), 0];

/** Takes a turn, for who has much to do: all of them share some ms of each round, and all else goes on between. */
function takeTurn<T>(work: () => T): Promise<T> {
  const turn = turns.then(async () => {
    if (performance.now() >= turnsEndMs) await twoRounds().then(() => (turnsEndMs = performance.now() + TURN.ms));
    return work();
  });
  turns = turn.catch(() => {}).then(() => {}); // What it gave is not kept until the next.
  return turn;
}

interface Peer {
  /** Whether each of its lines is a message of MCP, whether it has sent its last, whether it got its last answer. */
  isMcp: boolean;
  ended: boolean;
  isDone: boolean;
  /** What has not been read yet, and what the socket has not taken yet. */
  input: Buffer;
  unsent: Buffer;
  /** When to cut the connection off, ms on the monotonic clock. */
  deadlineMs: number;
}

/** What a peer asks next, and what it has sent behind that; null where that is not known yet. */
function readQuestion(socket: Bun.Socket<Peer>, { isCrowded }: { isCrowded: () => boolean }) {
  const { isDone, input, ended } = socket.data;
  const isMcp = socket.data.isMcp || /^[ \t\r]*\{/.test(input.toString("latin1", 0, MAX_LINE_BYTES));
  if (isDone || (input.length === 0 && (isMcp || !ended))) return null;
  // This machine is on loopback, or at the very address that it connected to.
  const isLocal = () => isLoopback(socket.remoteAddress) || socket.remoteAddress === socket.localAddress;
  const last = (question: Question) => ({ question, rest: Buffer.alloc(0), isMcp: false });
  if (isMcp && !socket.data.isMcp && !isLocal()) return last(answerWith("ERR Not Allowed"));
  const cut = takeLine(input, { ended, limit: isMcp ? MAX_MCP_LINE_BYTES : MAX_LINE_BYTES });
  if (cut === "incomplete") return null;
  if (isMcp && !socket.data.isMcp && isCrowded()) return last(answerWith("ERR Busy"));
  if (cut === "too long") return last(answerWith("ERR Line Too Long"));
  return isMcp ? { question: readMcp(cut.line), rest: cut.rest, isMcp } : last(findQuestion(cut.line, { isLocal }));
}

/** Hands the socket what it takes of all that is unsent; true where nothing is left. */
function flush(socket: Bun.Socket<Peer>): boolean {
  const peer = socket.data;
  const taken = peer.unsent.length > 0 ? Math.max(socket.write(peer.unsent), 0) : 0;
  if (taken > 0 || peer.deadlineMs === Infinity) peer.deadlineMs = performance.now() + PATIENCE_MS;
  peer.unsent = peer.unsent.subarray(taken);
  return peer.unsent.length === 0;
}

/** Makes the function that does all that can be done for a peer now. */
function createPump(peers: Set<Bun.Socket<Peer>>, watch: Watch) {
  /** What all share who wait for a look. */
  let resuming: Promise<void> | null = null;
  /** Idle agents leave room for everybody else. */
  const isCrowded = () => [...peers].filter(({ data }) => data.isMcp).length >= MAX_CONNECTIONS / 2;
  const held = (all: { data: Peer }[]) => all.reduce((n, { data }) => n + data.input.length + data.unsent.length, 0);

  const resumeAll = () => {
    resuming = null;
    peers.forEach((socket) => pump(socket));
  };

  /** Answers what a peer asks; tells what its next line waits for where one is left unread. */
  function answer(socket: Bun.Socket<Peer>, { hasTurn }: { hasTurn: boolean }): "look" | "turn" | null {
    const peer = socket.data;
    const mayRead = hasTurn || peer.input.length * peers.size <= MAX_MCP_LINE_BYTES;
    let replies = "";
    let waitsFor: "look" | "turn" | null = "turn";
    for (let lines = 0; mayRead && lines < TURN.lines && replies.length < TURN.bytes && waitsFor === "turn"; lines++) {
      const asked = readQuestion(socket, { isCrowded });
      const wait = asked?.question.needsLook ? watch.whenSettled() : null;
      if (wait) resuming ??= wait.then(resumeAll);
      peer.isMcp = asked?.isMcp ?? peer.isMcp;
      waitsFor = wait ? "look" : asked?.isMcp && asked.rest.length > 0 ? "turn" : null;
      if (!asked || wait) break;
      peer.input = asked.rest;
      peer.isDone = !peer.isMcp;
      const reply = asked.question.reply(watch.describe());
      if (reply !== null) replies += `${reply}\n`;
    }
    peer.unsent = Buffer.from(replies);
    return waitsFor;
  }

  function pump(socket: Bun.Socket<Peer>, hasTurn = false): void {
    const peer = socket.data;
    const waitsFor = flush(socket) ? answer(socket, { hasTurn }) : null;
    if (peer.input.length * 2 <= peer.input.buffer.byteLength) peer.input = Buffer.from(peer.input); // Frees the rest.
    const isSent = flush(socket);
    if (isSent && waitsFor === "turn") void takeTurn(() => peer.isDone || pump(socket, true));
    if (isSent && (waitsFor === "look" || peer.isMcp)) peer.deadlineMs = Infinity;
    if (!isSent || waitsFor) {
      socket.pause();
      if (held([socket]) * peers.size > MAX_HELD_BYTES && held([...peers]) > MAX_HELD_BYTES) socket.terminate();
    } else if (peer.isDone || (peer.isMcp && peer.ended && peer.input.length === 0)) {
      peer.isDone = true;
      peer.deadlineMs = performance.now() + PATIENCE_MS;
      socket.resume();
      if (peer.ended) socket.end();
      else socket.shutdown();
    } else socket.resume();
  }

  return pump;
}

/** Answers questions over TCP. Throws an Error where it cannot listen. */
export function startServer({ options: { host, port } }: World, watch: Watch) {
  const peers = new Set<Bun.Socket<Peer>>();
  const pump = createPump(peers, watch);
  const listener = Bun.listen<Peer>({
    hostname: host,
    port,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        const isBusy = peers.size >= MAX_CONNECTIONS;
        const unsent = isBusy ? Buffer.from("ERR Busy\n") : Buffer.alloc(0);
        const deadlineMs = performance.now() + PATIENCE_MS;
        socket.data = { isMcp: false, ended: false, isDone: isBusy, input: Buffer.alloc(0), unsent, deadlineMs };
        if (peers.size >= 2 * MAX_CONNECTIONS) return void socket.terminate();
        peers.add(socket);
        if (isBusy) pump(socket);
      },
      data(socket, chunk) {
        const peer = socket.data;
        if (peer.isDone) return;
        peer.input = peer.input.length > 0 ? Buffer.concat([peer.input, chunk]) : chunk;
        pump(socket);
      },
      end(socket) {
        socket.data.ended = true;
        pump(socket);
      },
      drain: (socket) => void (socket.data.unsent.length > 0 && pump(socket)), // Bun calls it after each resume.
      close: (socket) => void (socket.data.isDone = peers.delete(socket)),
      error() {}, // The peer is gone, which close has said already.
    },
  });

  return {
    port: listener.port,
    /** To be called every second: cuts off peers whose time is up. */
    tick(): void {
      for (const socket of peers) if (performance.now() >= socket.data.deadlineMs) socket.terminate();
    },
    /** Listens no more, lets answers under way arrive for up to a second, then closes everything. */
    async stop(): Promise<void> {
      listener.stop();
      await waitWhile(() => [...peers].some(({ data }) => data.isDone), SECOND);
      listener.stop(true);
    },
  };
}

// ── Effects: the gateway ────────────────────────────────────────────────────────────────────────

const MAX_BODY_BYTES = 8 * 1024 * 1024;
const MAX_IDS = 100_000; // So many take 10 MiB; all are forgotten then, and an answer that is polled counts again.

type Recorder = { hold(size: number): boolean; read(part: string): Promise<unknown>; end(answer: Response): Response };
type Relaying = Recorder & { isAsking: boolean; signal: AbortSignal };
const copy = (cut: string) => Buffer.from(cut, "latin1").toString("latin1"); // Else it keeps what it was cut out of.

/** Passes an answer on as it comes, less the event that was asked for; what is too long to be held passes unread. */
async function* relay(answer: Response, { isAsking, signal, hold, read, end }: Relaying) {
  const isReadable = answer.ok && /^(identity)?$/i.test(answer.headers.get("content-encoding") ?? "");
  const type = (isReadable && answer.headers.get("content-type")) || "";
  const isEvents = /^text\/event-stream/i.test(type);
  const isRead = isEvents || /^application\/json/i.test(type);
  const isAsked = isAsking && isEvents;
  const isUsage = (json: unknown) => isAsked && UsageEventSchema.safeParse(json).success;
  /** What has come of an event, or of the whole; null in the midst of what is too long. */
  let held: string | null = isRead ? "" : null;
  let [tail, pieces] = ["", 0]; // the last two letters, and the pieces of what is held: each takes 128 bytes
  /** Gives what to pass on of a chunk; a function of its own, since a generator keeps all that it has while it waits. */
  const take = async (chunk: Uint8Array) => {
    if (chunk.length > 16384) await takeTurn(() => {}); // Others have theirs too, however much has come.
    const piece = isRead ? Buffer.from(chunk).toString("latin1") : "";
    const [text, seam] = [(held ?? "") + piece, tail + piece];
    let [shown, from, at] = ["", 0, 0];
    for (const [event] of isEvents && /\n\r?\n/.test(seam) ? text.matchAll(EVENTS) : []) {
      if (isUsage(await read(event))) [shown, from] = [shown + text.slice(from, at), at + event.length];
      [at, pieces] = [at + event.length, 0];
      if (text.length <= TURN.bytes || !signal.aborted) continue;
      await read(text.match(/^.*_tokens.*/gm)?.at(-1) ?? ""); // To read all can take minutes: the last tells most.
      break;
    }
    tail = copy(seam.slice(-2));
    const rest = at > 0 ? copy(text.slice(at)) : text;
    held = (held !== null || at > 0) && hold(rest.length + 128 * ++pieces) ? rest : null;
    return isAsked ? Buffer.from(shown + text.slice(from, held === null ? undefined : at), "latin1") : chunk;
  };
  try {
    for await (const chunk of answer.body ?? []) yield await take(chunk);
  } finally {
    if (isUsage(await read(held ?? ""))) held = null; // It counts even where its end has never come.
    end(answer);
  }
  if (isAsked) yield Buffer.from(held ?? "", "latin1");
}

/** Listens for HTTP on loopback, and passes requests on while the breaker is closed. Throws where it cannot listen. */
export function startGateway({ options, self, env, now, log }: World, watch: Watch) {
  /** What answers have told today, by id: one that is polled tells it again, a stream may tell it as it grows. */
  let counted = { day: "", ids: new Map<number, number>() };
  const underWay = new Set<Request>();
  /** What may be held of all bodies; requests wait for it, answers pass unread where there is none. */
  const [requests, answers] = [{ left: 4 * MAX_HELD_BYTES }, { left: 4 * MAX_HELD_BYTES }];
  /** Bun sends so many requests at once: more would wait in it, past a trip, and the looks behind them. */
  const room = Math.max(Math.min((Number.parseInt(env["BUN_CONFIG_MAX_HTTP_REQUESTS"] ?? "") || 256) - 56, 200), 1);

  function countOnce({ id, model, usage, created, created_at = created }: Spending): void {
    const today = formatDay(now());
    if (today !== counted.day || counted.ids.size >= MAX_IDS) counted = { day: today, ids: new Map() };
    const key = Number(Bun.hash(id, SEED)); // An id can be long.
    const more = (usage ?? 0) - (counted.ids.get(key) ?? 0);
    if (more <= 0) return;
    counted.ids.set(key, usage ?? 0);
    watch.count({ day: created_at === undefined ? today : formatDay(created_at * SECOND), model, amount: more });
  }

  /** What is kept of a request until its answer ends, which writes a line to the log. */
  function createRecorder(request: Request, { method, url, headers } = request) {
    const values = [...headers].flatMap(([name, value]) => (/auth|key|token|cookie/.test(name) ? value : []));
    const beganMs = performance.now();
    let told: Spending | null = null;
    let [held, parts, pool] = [0, 0, requests];
    /** Whether so much may be held in place of what was: 8 MiB, and a quarter of what all others leave, at most. */
    const hold = (size: number, next = answers) => {
      pool.left += held;
      pool = next;
      held = size <= Math.min(pool.left / 4, MAX_BODY_BYTES) ? size : 0;
      pool.left -= held;
      return held === size || size <= TURN.bytes; // What is small may always be held.
    };
    /** Gives the JSON of a part of the answer, and counts what it tells; most events of a stream tell nothing. */
    const read = async (part: string) => {
      const isSilent = !part.includes("_tokens") && (told !== null || !part.includes('"model"'));
      const isMuch = !isSilent || part.length > TURN.bytes || ++parts % 256 === 0;
      const work = () => (isSilent ? undefined : readJson(part));
      const json = isMuch ? await takeTurn(work) : work();
      const spending = json === undefined ? undefined : AnswerSchema.safeParse(json).data;
      if (spending) countOnce(spending);
      if (spending && (told?.usage ?? -1) <= (spending.usage ?? -1)) told = spending;
      return json;
    };
    const end = (answer: Response) => {
      const path = URL.canParse(url) ? new URL(url).pathname : "?";
      const spent = told ? ` ${told.model} ${told.usage === null ? "tokens unknown" : `${told.usage} tokens`}` : "";
      const line = `${method} ${path} ${answer.status}${spent} ${((performance.now() - beganMs) / SECOND).toFixed(2)} s`;
      const words = values.join(" ").split(/[\s,;="]+/, 200); // One may be echoed; to look for more takes a ms.
      hold(0);
      underWay.delete(request);
      log(redact(line, [...self.keys, ...words].filter(isSecret)));
      return answer;
    };
    return { hold, read, end };
  }

  /** What to send on of a request, once it can be decided on, and whether that asks for the usage of a stream. */
  async function prepare(request: Request, { hold }: Pick<ReturnType<typeof createRecorder>, "hold">) {
    const pauseMs = () => Math.max(50, server.pendingRequests / 4); // Four of them look in a ms, however many wait.
    const standBy = (holds: () => boolean) => waitWhile(() => holds() && !request.signal.aborted, Infinity, pauseMs);
    await standBy(() => watch.whenSettled() !== null);
    if (server.pendingRequests > room) await Bun.sleep(pauseMs()); // Who comes goes behind all who wait.
    const isChat = request.method === "POST" && new URL(request.url).pathname.endsWith("/completions");
    const size = Number.parseInt(request.headers.get("content-length") ?? "");
    const isAskable = isChat && options.allowances.length > 0 && size <= MAX_BODY_BYTES;
    const isOpen = () => watch.describe().open;
    if (isAskable) await standBy(() => !isOpen() && !hold(size, requests));
    if (isAskable && isOpen()) return { headers: new Headers(), body: null, isAsking: false }; // Never sent.
    const text = isAskable ? Buffer.from(await request.arrayBuffer()).toString("latin1") : null;
    const asking = text === null ? null : await takeTurn(() => (request.signal.aborted ? null : askForUsage(text)));
    const enters = () => underWay.size < room && Boolean(underWay.add(request));
    await standBy(() => watch.whenSettled() !== null || (!isOpen() && !enters()));
    const headers = passHeaders(request.headers);
    headers.set("accept-encoding", "identity");
    if (text === null) return { headers, body: request.body, isAsking: false };
    const bytes = Buffer.from(asking ?? text, "latin1");
    headers.set("content-length", String(bytes.length));
    const start = (to: ReadableStreamDefaultController) => [to.enqueue(bytes), to.close()];
    const body = bytes.length > TURN.bytes ? new ReadableStream({ start }) : bytes; // Bun keeps bytes to the end.
    return { headers, body, isAsking: Boolean(asking) };
  }

  /** Sends a request on where it may pass, and gives its answer while that comes. */
  async function pass(request: Request, recorder: ReturnType<typeof createRecorder>): Promise<Response> {
    await takeTurn(() => {}); // Many may have come in one moment.
    const refusal = screen(request, server.port ?? 0);
    if (refusal) return recorder.end(refusal);
    const { headers, body, isAsking } = await prepare(request, recorder);
    const { open, message } = watch.describe(); // Only now: while a body came, or waited, the breaker may have tripped.
    const sentence = `Refused by the circuit breaker on this machine: ${message}`;
    if (open || !underWay.has(request)) return recorder.end(refuse("breaker_open", sentence));
    const to = request.url.replace(/^http:\/\/[^/]*\/v1/, () => options.baseUrl);
    const answer = await fetch(to, { method: request.method, headers, body, signal: request.signal, ...ON_WIRE });
    const head = { status: answer.status, statusText: answer.statusText, headers: passHeaders(answer.headers) };
    if (!answer.body || request.signal.aborted) return recorder.end(new Response(null, head)); // Nobody reads it.
    return new Response(relay(answer, { isAsking, signal: request.signal, ...recorder }), head);
  }

  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: options.gateway || 0,
    development: false, // Bun would print each answer that is cut.
    reusePort: false, // Without development, Bun would share a port in use.
    maxRequestBodySize: Number.MAX_SAFE_INTEGER,
    fetch(request) {
      server.timeout(request, 0); // A model may think for minutes; who sends no request is cut off.
      const recorder = createRecorder(request);
      const fail = (error: unknown) => refuse("upstream_failed", `Cannot reach the API: ${redact(messageOf(error))}`);
      return pass(request, recorder).catch((error) => recorder.end(fail(error)));
    },
  });
  return { url: `http://127.0.0.1:${server.port}/v1`, stop: () => server.stop(true) };
}

// ── Effects: hooks ──────────────────────────────────────────────────────────────────────────────

/** Runs what the user wants to be run at a change of the answer; its failure is logged and changes nothing. */
async function runHook(info: Info, { options, self, env, signal, log }: World): Promise<void> {
  const [name, command] = info.open ? ["--on-trip", options.onTrip] : ["--on-reset", options.onReset];
  if (!command || signal.aborted) return;
  const variables = {
    BREAKER_OPEN: info.open ? "TRUE" : "FALSE",
    BREAKER_REASON: info.reason,
    BREAKER_MESSAGE: info.message,
    BREAKER_COST: String(info.cost?.total ?? ""),
  };
  const run = { env: { ...childEnv({ env, self }), ...variables }, signal, input: `${JSON.stringify(info)}\n` };
  try {
    const { code, stdout, stderr } = await runProgram(["sh", "-c", command], run);
    for (const line of `${stdout}\n${stderr}`.split("\n", 990)) if (line.trim()) log(`${name}: ${redact(line)}`);
    if (code !== 0) log(`${name}: ended with exit code ${code}`);
  } catch (error) {
    log(`${name}: killed, ${messageOf(error)}`);
  }
}

// ── Effects: asking a running breaker ───────────────────────────────────────────────────────────

/** Where a running breaker is, and after how long at the latest it answers. */
export type Address = Pick<Options, "host" | "port" | "timeoutMs">;

/** Asks one question; throws an Error that says what to do where nothing answers within 2 s more than the breaker's time. */
export async function ask(question: string, { host, port, timeoutMs }: Address): Promise<string> {
  const limitMs = timeoutMs + 2 * SECOND;
  const hostname = host === "0.0.0.0" ? "127.0.0.1" : host === "::" ? "::1" : host;
  const { connect } = await import("node:net"); // Only here, since it takes its time to load.
  const socket = connect({ host: hostname, port }).setEncoding("utf8");
  const timer = setTimeout(() => socket.destroy(new Error(`nothing came within ${limitMs / SECOND} s`)), limitMs);
  let text = "";
  try {
    socket.write(`${question}\n`);
    for await (const piece of socket) if ((text += piece).length > MAX_READ_BYTES) throw new Error("it is over 1 MiB");
    if (!text.endsWith("\n")) throw new Error("the connection closed without an answer");
    return text.trimEnd();
  } catch (error) {
    throw new Error(`No breaker answers at ${hostname}:${port}, ${messageOf(error)}; start one with: bun breaker.ts`);
  } finally {
    clearTimeout(timer);
    socket.destroy();
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

/** What `ps` prints; nothing where it finds none, is not there, or cannot be started. */
function runPs(...args: string[]): string {
  try {
    const ps = Bun.which("ps", { PATH: "/usr/bin:/bin" }) ?? "";
    return Bun.spawnSync([ps, "-ww", ...args], { env: { LC_ALL: "C.UTF-8" } }).stdout.toString();
  } catch {
    return "";
  }
}

/** Whether `pid` is a breaker that serves from this file at `port`, as far as its arguments tell. */
function isBreaker(pid: number, port: number): boolean {
  const [path, name] = [import.meta.path, basename(import.meta.path)].map(RegExp.escape);
  const form = new RegExp(`^(?=\\S*bun)\\S+ (run )?(-\\S+ )*(${path}|(\\S*/)?${name})( serve)?(?<options> --.*)?$`);
  const found = form.exec(runPs("-o", "args=", "-p", String(pid)).trimEnd())?.groups;
  const ports = [...(found?.["options"] ?? "").matchAll(/ --port[= ](\d+)/g)].map(([, digits]) => Number(digits));
  return found !== undefined && !found["options"]?.includes(" exec -- ") && [0, port].includes(ports.at(-1) ?? port);
}

/** Ends the breaker that answers, and waits until it is gone; throws where that cannot be. */
async function stopBreaker({ options }: World): Promise<number> {
  const { pid } = await askInfo(options);
  if (!isBreaker(pid, options.port)) {
    throw new Error(`Process ${pid} is no breaker that runs here at ${options.port}; stop it there, or with: kill`);
  }
  if (!kill(pid, "SIGTERM")) throw new Error(`Process ${pid} cannot be stopped; try it as the user who started it`);
  if (await waitWhile(() => isBreaker(pid, options.port), PATIENCE_MS)) return EXIT.closed;
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
  const someRun = () => (family = family.filter((member) => kill(member, 0))).length > 0; // A pid is soon another's.
  const isOver = await waitWhile(someRun, PATIENCE_MS);
  for (const member of isOver ? [] : findFamily(family)) kill(member, "SIGKILL");
  await exited;
}

/** Asks every second, and gives the reason once the breaker is open, or unknown for too long. */
async function waitForTrip({ options, signal }: World): Promise<string | null> {
  for (let failingSinceMs = Infinity; ;) {
    await Bun.sleep(SECOND);
    if (signal.aborted) return null;
    try {
      if (await askStatus(options)) break;
      failingSinceMs = Infinity;
    } catch (error) {
      failingSinceMs = Math.min(failingSinceMs, performance.now());
      if (performance.now() - failingSinceMs >= PATIENCE_MS && options.whenUnknown) return messageOf(error);
    }
  }
  const info = await askInfo({ ...options, timeoutMs: 0 }).catch(() => null);
  return info?.message ?? "TRUE";
}

/** Runs a command while the breaker is closed; gives its exit code, or 75. Throws where at first no breaker answers. */
async function guard(world: World): Promise<number> {
  const { options, rest: argv, log, signal } = world;
  const env = childEnv(world);
  // STATUS has the last word. Who cannot be told of a gateway must not go past it; another machine's is of no use.
  const readNone = (error: unknown) => (/answers "(?!ERR Busy)/.test(messageOf(error)) ? null : Promise.reject(error));
  const info = await askInfo(options).catch(readNone);
  if (await askStatus(options)) {
    log(`the breaker is open, ${argv[0]} was not started: ${redact(info?.open ? info.message : "TRUE")}`);
    return EXIT.stopped;
  }
  const gateway = info?.gateway ?? undefined;
  const OPENAI_BASE_URL = env["OPENAI_BASE_URL"] || gateway;
  if (gateway && gateway !== OPENAI_BASE_URL) log(`OPENAI_BASE_URL is set, so the gateway at ${gateway} is not used`);
  let child: Bun.Subprocess | null = null;
  hearSignals((name) => {
    const isTyped = [0, 1, 2].some(isatty) && (name === "SIGINT" || name === "SIGQUIT"); // The terminal sends it too.
    if (!isTyped) child?.kill(name);
  }, signal);
  try {
    child = Bun.spawn(argv, { env: { ...env, OPENAI_BASE_URL }, stdio: ["inherit", "inherit", "inherit"] });
  } catch (error) {
    log(`cannot run ${argv[0]}: ${messageOf(error)}`);
    return z.object({ code: z.literal("ENOENT") }).safeParse(error).success ? EXIT.notFound : EXIT.notExecutable;
  }
  const reason = await Promise.race([child.exited.then(() => null), waitForTrip(world)]);
  if (reason === null) return child.exited;
  log(`the breaker is open, stopping ${argv[0]}: ${redact(reason)}`);
  await endCommand(child);
  return EXIT.stopped;
}

// ── main ────────────────────────────────────────────────────────────────────────────────────────

/** What the drill's account answers to a request for tokens, plain or streamed: 120, in the shapes of both APIs. */
function answerDrill(request: string): Response {
  const [text, created] = ["This is a drill.", Math.floor(Date.now() / SECOND)];
  const message = { role: "assistant", content: text };
  const answer = {
    ...{ id: crypto.randomUUID(), model: "drill", created, created_at: created },
    choices: [{ index: 0, finish_reason: "stop", message, delta: message }],
    output: [{ type: "message", role: "assistant", content: [{ type: "output_text", text, annotations: [] }] }],
    usage: { input_tokens: 90, output_tokens: 30, prompt_tokens: 90, completion_tokens: 30, total_tokens: 120 },
  };
  if (!StreamRequestSchema.safeParse(parseJson(request)).success) return Response.json(answer);
  const event = JSON.stringify({ ...answer, type: "response.completed", response: answer });
  return new Response(`data: ${event}\n\ndata: [DONE]\n\n`, { headers: { "content-type": "text/event-stream" } });
}

/** Serves a simulated account on loopback that costs one cent after 10 s; gives its base URL. */
function startDrill({ self, now, signal }: World): string {
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch(request) {
      if (request.method === "POST") return answerDrill(await request.text());
      const value = now() - self.startedMs >= 10 * SECOND ? "0.0100000000000000" : "0E-6176";
      const row = { amount: { value, currency: "usd" }, input_tokens: 90, output_tokens: 30, model: "drill" };
      const bucket = { start_time: Date.parse(listDays(now()).today) / SECOND, results: [row] };
      return Response.json({ object: "page", data: [bucket], has_more: false, next_page: null });
    },
  });
  signal.addEventListener("abort", () => void server.stop(true));
  return `http://127.0.0.1:${server.port}/v1`;
}

/** The world with the account that is looked at: in a drill its own. */
function prepareAccount(world: World): World {
  const { drill, baseUrl } = world.options;
  // Bun would send even a request to loopback through HTTP_PROXY, and the key with it.
  if (drill || baseUrl.startsWith("http:")) process.env["NO_PROXY"] = process.env["no_proxy"] = "*";
  return drill ? { ...world, options: { ...world.options, baseUrl: startDrill(world) } } : world;
}

/** Starts what listens at `place`; throws an Error that says what to do where it cannot. */
function listen<Listener>({ flag, place }: { flag: string; place: string }, start: () => Listener): Listener {
  try {
    return start();
  } catch (error) {
    throw new Error(`Cannot listen at ${place}: ${messageOf(error)}; take another ${flag}, or stop what listens there`);
  }
}

async function serve(given: World): Promise<number> {
  const log = (text: string) => given.log(`${new Date(given.now()).toISOString()} ${text}`);
  const world = prepareAccount({ ...given, log });
  const { options, self, signal, stop } = world;
  const { look, forgetKey } = createLook(world);
  let error: string | null = null;
  let newest: Info | null = null;
  let hooks = Promise.resolve();
  const onAnswer = (info: Info) => {
    if (info.error !== error) log(info.error ?? "the account can be read again");
    error = info.error;
    if (info.open === newest?.open) return;
    log(`${info.open ? "TRUE" : "FALSE"}, ${info.message}`);
    // One hook at a time, while only the newest change waits.
    if (info.open || newest) hooks = hooks.then(() => (info === newest ? runHook(info, world) : undefined));
    newest = info;
  };
  const watch = startWatch(world, { look, onAnswer });
  const server = listen({ flag: "--port", place: `${options.host}:${options.port}` }, () => startServer(world, watch));
  const startGate = () => (options.gateway === "" ? null : startGateway(world, watch));
  const gateway = listen({ flag: "--gateway", place: `127.0.0.1:${options.gateway}` }, startGate);
  self.gateway = gateway?.url ?? null;
  hearSignals((name) => {
    if (name !== "SIGHUP") return stop();
    forgetKey();
    watch.hurry();
  }, signal);
  log(`breaker ${VERSION} listens on ${options.host}:${server.port}, looks at ${resolveSource(options)}`);
  if (gateway) log(`the gateway is ${gateway.url}`);
  const ticker = setInterval(() => [watch, server].forEach((each) => each.tick()), SECOND);
  watch.hurry();
  await new Promise((resolve) => signal.addEventListener("abort", resolve));
  log("stopping");
  clearInterval(ticker);
  await Promise.all([server.stop(), gateway?.stop()]);
  return EXIT.closed;
}

/** What `check` prints for a person: the days, the allowances, and the verdict. */
export function formatCheck(info: Info, { now, isColoured }: { now: number; isColoured: boolean }): string {
  const paint = (colour: number, text: string) => (isColoured ? `\x1b[1;${colour}m${text}\x1b[0m` : text);
  const { yesterday, today } = listDays(now);
  const rows = [yesterday, today].map((day) => {
    const cost = info.cost?.days[day];
    return { name: day, value: cost === undefined ? "unknown" : `${formatAmount(cost)} usd` };
  });
  for (const { models, used, limit } of info.allowances) {
    const share = Math.min((used ?? 0) / limit, 1);
    const bar = paint(share < 0.8 ? 32 : share < 1 ? 33 : 31, `[${"#".repeat(share * 20).padEnd(20, ".")}]`);
    rows.push({ name: models, value: `${bar} ${used ?? "unknown"} of ${limit} tokens` });
  }
  const width = Math.max(...rows.map(({ name }) => name.length));
  const table = rows.map(({ name, value }) => `${name.padEnd(width)}  ${value}\n`).join("");
  const verdict = info.reason === "unknown" ? "unknown" : info.open ? "open" : "closed";
  const age = info.asOf === null ? "" : `${info.source}, ${info.ageSeconds} s ago\n`;
  return `${table}${paint({ closed: 32, open: 31, unknown: 33 }[verdict], verdict)}: ${info.message}\n${age}`;
}

async function check(given: World): Promise<number> {
  const world = prepareAccount(given);
  const { options, self, now, signal, print, isColoured } = world;
  hearSignals(world.stop, signal);
  const reading = mergeLook(UNSEEN, await createLook(world).look(() => {}));
  if (signal.aborted) throw new Error("The check was interrupted");
  const info = describe({ now: now(), reading, options, ...self });
  await print(options.json ? `${JSON.stringify(info)}\n` : formatCheck(info, { now: now(), isColoured }));
  return info.reason === "unknown" ? EXIT.unavailable : info.open ? EXIT.open : EXIT.closed;
}

/** MCP on stdin and stdout until the end of input; each call asks the running breaker. */
async function speakMcp({ options, self, now, lines, print }: World): Promise<number> {
  const unknown = { ...describe({ now: now(), reading: UNSEEN, options, ...self }), open: true };
  const explainNone = (error: unknown): Info => ({ ...unknown, message: messageOf(error), error: messageOf(error) });
  for await (const line of lines) {
    const isLong = Buffer.byteLength(line) > MAX_MCP_LINE_BYTES;
    const question = isLong ? answerError(undefined, { code: -32600, message: "Line Too Long" }) : readMcp(line);
    const reply = question.reply(question.needsLook ? await askInfo(options).catch(explainNone) : explainNone(""));
    if (reply !== null) await print(`${reply}\n`);
    if (isLong) break;
  }
  return EXIT.closed;
}

async function printStatus({ options, print }: World): Promise<number> {
  const isOpen = await askStatus(options);
  await print(isOpen ? "TRUE\n" : "FALSE\n");
  return isOpen ? EXIT.open : EXIT.closed;
}

const RUN = { serve, check, status: printStatus, stop: stopBreaker, exec: guard, mcp: speakMcp };

/** Runs a command line and gives its exit code; never throws. */
export async function main(argv: string[], surroundings: Surroundings): Promise<number> {
  const controller = new AbortController();
  const stop = () => controller.abort();
  try {
    const call = parseArguments(argv, surroundings.env);
    if (call.command === "print") return await surroundings.print(call.text).then(() => EXIT.closed);
    const self = { startedMs: surroundings.now(), gateway: null, keys: [] };
    return await RUN[call.command]({ ...surroundings, ...call, self, stop, signal: controller.signal });
  } catch (error) {
    surroundings.log(`breaker: ${redact(messageOf(error))}`);
    return error instanceof UsageError ? EXIT.usage : EXIT.unavailable;
  } finally {
    stop();
  }
}

if (import.meta.main) {
  const pending: Buffer[] = []; // A text could keep what it was cut out of.
  let sent: Promise<unknown> = Promise.resolve();
  /** Writes in a thread, since who reads may be asleep (a full pipe, a stopped terminal), or gone: then nobody is told. */
  function log(text: string): void {
    if (pending.push(Buffer.from(`${text}\n`)) > 10_000) return void pending.pop();
    sent = sent.then(async () => pending[0] && promisify(write)(2, Buffer.concat(pending.splice(0)))).catch(() => {});
  }
  const code = await main(Bun.argv.slice(2), {
    env: { ...process.env },
    now: Date.now,
    lines: console,
    print: (text) => Bun.write(Bun.stdout, text),
    log,
    isColoured: isatty(1) && !process.env["NO_COLOR"],
  });
  await Promise.race([sent, Bun.sleep(SECOND)]);
  process.exit(code);
}
