// A small HTTP server with data of its own: objects in V8's heap, bytes outside.
// What it answers can be computed by who asks.

"use strict";

const http = require("node:http");

const USERS = 200000;
const BLOB_BYTES = 32 << 20;

const users = Array.from({ length: USERS }, (_, number) => ({
  id: number,
  name: `user ${(number * 7919) % 1000003}`,
  visits: 0,
}));
const blob = Buffer.alloc(BLOB_BYTES);
for (let at = 0; at < BLOB_BYTES; at += 4) {
  blob.writeUInt32LE(Math.imul(at, 2654435761) >>> 0, at);
}

const answers = {
  // Look at an object and write to it.
  user(number) {
    const user = users[number];
    user.visits += 1;
    return user;
  },
  // Read four bytes.
  word(at) {
    return blob.readUInt32LE(at * 4);
  },
  // Make garbage: V8 gives memory back and takes new.
  sort(seed) {
    const values = Array.from({ length: 5000 }, (_, n) => (n * seed) % 5003);
    return values.sort((one, other) => one - other)[2500];
  },
};

const server = http.createServer((request, response) => {
  const [, name, argument] = request.url.split("/");
  response.setHeader("content-type", "application/json");
  response.end(JSON.stringify(answers[name](Number(argument))));
});

server.keepAliveTimeout = 0; // a client may take its time

server.listen(0, "127.0.0.1", () => {
  console.log(server.address().port);
});
