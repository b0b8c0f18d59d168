/**
 * The other side of a row of the gateway: `@portkey-ai/gateway`, at a free port of loopback, since it would
 * listen on every address. `bench.ts` copies this file beside an installation of it.
 */
import { Server } from "node:net";

const { listen } = Server.prototype;
Server.prototype.listen = function (_port, _host, listening) {
  return listen.call(this, 0, "127.0.0.1", () => {
    listening?.();
    console.error(`listens on 127.0.0.1:${this.address().port}`);
  });
};
await import("@portkey-ai/gateway/build/start-server.js");
