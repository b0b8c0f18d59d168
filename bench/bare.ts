/**
 * The limit of the runtime, for the row against a bare `Bun.listen`: whatever comes, it writes `FALSE`
 * and shuts down. It looks at nothing and bounds nothing.
 *
 * @module
 */
const server = Bun.listen({
  hostname: "127.0.0.1",
  port: 0,
  allowHalfOpen: true,
  socket: {
    data(socket) {
      socket.write("FALSE\n");
      socket.shutdown();
    },
    end: (socket) => void socket.end(),
  },
});
console.log(`listens on 127.0.0.1:${server.port}`);
