/**
 * The other side of the MCP row: the official SDK with one tool that answers as breaker_status does, over
 * TCP with the framing of stdio. `bench.ts` copies this file beside an installation of the SDK.
 */
import { createServer } from "node:net";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StdioServerTransport } from "@modelcontextprotocol/sdk/server/stdio.js";
import { z } from "zod";

const outputSchema = {
  open: z.boolean(),
  reason: z.enum(["none", "cost", "allowance", "unknown"]),
  message: z.string(),
  cost: z.object({ total: z.number(), currency: z.string(), days: z.record(z.string(), z.number()) }).nullable(),
  threshold: z.number(),
  allowances: z.array(z.object({ models: z.string(), used: z.number().nullable(), limit: z.number() })),
  asOf: z.string().nullable(),
  ageSeconds: z.number().nullable(),
  error: z.string().nullable(),
  source: z.string(),
  version: z.string(),
  startedAt: z.string(),
};

const startedMs = Date.now();
const day = (ms) => new Date(ms).toISOString().slice(0, 10);

function describe() {
  const now = Date.now();
  const [yesterday, today] = [day(now - 86_400_000), day(now)];
  return {
    open: false,
    reason: "none",
    message: `no cost on ${yesterday} and ${today} (UTC)`,
    cost: { total: 0, currency: "usd", days: { [yesterday]: 0, [today]: 0 } },
    threshold: 0,
    allowances: [],
    asOf: new Date(startedMs).toISOString(),
    ageSeconds: Math.floor((now - startedMs) / 1000),
    error: null,
    source: "costs",
    version: "1.0.0",
    startedAt: new Date(startedMs).toISOString(),
  };
}

/** A server for one connection, as the SDK wants it. */
function connect(socket) {
  const server = new McpServer({ name: "sdk", version: "1.0.0" });
  const annotations = { readOnlyHint: true, openWorldHint: false };
  server.registerTool("breaker_status", { description: "Status", inputSchema: {}, outputSchema, annotations }, () => {
    const structuredContent = describe();
    return { content: [{ type: "text", text: JSON.stringify(structuredContent) }], structuredContent };
  });
  socket.on("error", () => socket.destroy());
  void server.connect(new StdioServerTransport(socket, socket));
}

const server = createServer(connect).listen(0, "127.0.0.1", () => {
  console.error(`listens on 127.0.0.1:${server.address().port}`);
});
