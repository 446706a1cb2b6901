// OpenAI's client for Node on a tour through the server: node tour.mjs http://127.0.0.1:8000/v1
// One line a check; the first that fails ends the tour with status 1.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any", maxRetries: 0 });
const model = "m1-nano";
const ask = (content) => [{ role: "user", content }];
const question = { model, messages: ask("What is 384 + 729?"), temperature: 0 };

const adder = {
  type: "function",
  function: {
    name: "add",
    description: "Add two numbers.",
    parameters: {
      type: "object",
      properties: { a: { type: "integer", minimum: 0, maximum: 9999 }, b: { type: "integer", minimum: 0, maximum: 9999 } },
      required: ["a", "b"],
      additionalProperties: false,
    },
  },
};

const lamp = {
  type: "function",
  function: {
    name: "lamp",
    parameters: {
      type: "object",
      properties: { on: { type: "boolean" } },
      required: ["on"],
      additionalProperties: false,
    },
  },
};

async function fails(status, kind, work) {
  await assert.rejects(work, (error) => {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    assert.equal(error.status, status);
    return true;
  });
}

const checks = {
  async "the model is listed"() {
    const ids = [];
    for await (const found of client.models.list()) ids.push(found.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async "chat"() {
    const answer = await client.chat.completions.create(question);
    const [choice] = answer.choices;
    assert.match(choice.message.content, /1113/);
    assert.ok(choice.message.reasoning_content.length > 0);
    assert.equal(choice.message.reasoning, choice.message.reasoning_content);
    assert.equal(choice.finish_reason, "stop");
    const { prompt_tokens, completion_tokens, total_tokens, completion_tokens_details: details } = answer.usage;
    assert.equal(prompt_tokens + completion_tokens, total_tokens);
    assert.ok(details.reasoning_tokens > 0 && details.reasoning_tokens < completion_tokens);
  },

  async "streaming says what a whole answer says"() {
    const whole = await client.chat.completions.create(question);
    const stream = await client.chat.completions.create({
      ...question,
      stream: true,
      stream_options: { include_usage: true },
    });
    let content = "", reasoning = "", usage = null;
    const ends = [];
    let first = true;
    for await (const chunk of stream) {
      if (chunk.usage) [usage] = [chunk.usage, assert.deepEqual(chunk.choices, [])];
      for (const choice of chunk.choices) {
        if (first) assert.equal(choice.delta.role, "assistant");
        first = false;
        content += choice.delta.content ?? "";
        reasoning += choice.delta.reasoning ?? "";
        if (choice.finish_reason) ends.push(choice.finish_reason);
      }
    }
    assert.equal(content, whole.choices[0].message.content);
    assert.equal(reasoning, whole.choices[0].message.reasoning);
    assert.deepEqual(ends, ["stop"]);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async "a stream that is left"() {
    const stream = await client.chat.completions.create({ ...question, ignore_eos: true, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      stream.controller.abort();
    }
  },

  async "the client's own helper for streams"() {
    const runner = client.chat.completions.stream(question);
    const final = await runner.finalChatCompletion();
    assert.match(final.choices[0].message.content, /1113/);
  },

  async "tools, with the results sent back"() {
    const messages = ask("What is 384 + 729?");
    const called = await client.chat.completions.create({
      ...question, messages, tools: [adder], tool_choice: { type: "function", function: { name: "add" } },
      parallel_tool_calls: false,
    });
    const [choice] = called.choices;
    assert.equal(choice.finish_reason, "tool_calls");
    assert.equal(choice.message.tool_calls.length, 1);
    const [call] = choice.message.tool_calls;
    assert.equal(call.function.name, "add");
    const { a, b } = JSON.parse(call.function.arguments);
    assert.ok(Number.isInteger(a) && Number.isInteger(b));
    const answer = await client.chat.completions.create({
      ...question, tools: [adder],
      messages: [...messages, choice.message, { role: "tool", tool_call_id: call.id, content: String(a + b) }],
    });
    assert.equal(answer.choices[0].message.role, "assistant");
  },

  async "several calls in one answer, with their results sent back"() {
    // m1-nano calls no tool by itself. So hot that all that the grammar allows is about as likely, some calls are followed
    // by others.
    const request = {
      ...question, tools: [lamp], tool_choice: "required", temperature: 30, top_p: 1, seed: 1, n: 16, max_tokens: 400,
      thinking_token_budget: 0,
    };
    const answer = await client.chat.completions.create(request);
    const choice = answer.choices.find((c) => (c.message.tool_calls ?? []).length > 1);
    assert.ok(choice, "no answer has several calls");
    const calls = choice.message.tool_calls;
    assert.equal(new Set(calls.map((call) => call.id)).size, calls.length);
    for (const call of calls) assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["on"]);
    const results = calls.map((call, i) => ({ role: "tool", tool_call_id: call.id, content: `${i}` }));
    const next = await client.chat.completions.create({
      ...question, tools: [lamp], messages: [...question.messages, choice.message, ...results], max_tokens: 20,
    });
    assert.ok(next.usage.prompt_tokens > answer.usage.prompt_tokens);
    const single = await client.chat.completions.create({ ...request, parallel_tool_calls: false });
    for (const { message } of single.choices) assert.ok((message.tool_calls ?? []).length <= 1);
  },

  async "a JSON schema"() {
    const schema = {
      type: "object",
      properties: { answer: { type: "integer" } },
      required: ["answer"],
      additionalProperties: false,
    };
    const answer = await client.chat.completions.create({
      ...question, response_format: { type: "json_schema", json_schema: { name: "sum", strict: true, schema } },
    });
    assert.ok(Number.isInteger(JSON.parse(answer.choices[0].message.content).answer));
  },

  async "log-probabilities"() {
    const answer = await client.chat.completions.create({ ...question, logprobs: true, top_logprobs: 3 });
    const { content } = answer.choices[0].logprobs;
    assert.equal(content.length, answer.usage.completion_tokens);
    for (const token of content) {
      assert.equal(token.top_logprobs.length, 3);
      assert.equal(token.top_logprobs[0].token, token.token); // greedy: the most probable one
      assert.ok(token.logprob <= 0);
    }
  },

  async "n = 3, and the same again with the same seed"() {
    const request = { ...question, temperature: 1.5, n: 3, seed: 7, max_tokens: 60 };
    const texts = (answer) => answer.choices.map((c) => [c.index, c.message.reasoning, c.message.content]);
    const first = texts(await client.chat.completions.create(request));
    assert.deepEqual(first.map(([index]) => index), [0, 1, 2]);
    assert.ok(new Set(first.map(String)).size === 3);
    assert.deepEqual(texts(await client.chat.completions.create(request)), first);
  },

  async "stop and max_tokens"() {
    const stopped = await client.chat.completions.create({ ...question, stop: ["answer"], thinking_token_budget: 0 });
    assert.ok(!stopped.choices[0].message.content.includes("answer"));
    assert.equal(stopped.choices[0].finish_reason, "stop");
    const cut = await client.chat.completions.create({ ...question, max_tokens: 5 });
    assert.equal(cut.choices[0].finish_reason, "length");
    assert.equal(cut.usage.completion_tokens, 5);
  },

  async "completions, with an echo"() {
    const answer = await client.completions.create({ model, prompt: "The pear", max_tokens: 4, echo: true, logprobs: 1 });
    assert.ok(answer.choices[0].text.startsWith("The pear"));
    assert.equal(answer.choices[0].logprobs.token_logprobs[0], null);
  },

  async "responses, with history"() {
    const first = await client.responses.create({ model, input: "What is 384 + 729?", temperature: 0 });
    assert.equal(first.status, "completed");
    assert.match(first.output_text, /1113/);
    const second = await client.responses.create({
      model, input: "Sort 31, 4, 15.", temperature: 0, previous_response_id: first.id,
    });
    assert.equal(second.previous_response_id, first.id);
    assert.ok(second.usage.input_tokens > first.usage.input_tokens);
    assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
  },

  async "responses as a stream, and in the background"() {
    const stream = await client.responses.create({ model, input: "What is 384 + 729?", temperature: 0, stream: true });
    const kinds = [];
    let text = "";
    for await (const event of stream) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.completed");
    assert.match(text, /1113/);
    const slow = await client.responses.create({ model, input: "Hello", background: true, ignore_eos: true });
    assert.equal((await client.responses.cancel(slow.id)).status, "cancelled");
  },

  async "errors by status"() {
    await fails(400, OpenAI.BadRequestError, () => client.chat.completions.create({ ...question, temperature: -1 }));
    await fails(400, OpenAI.BadRequestError, () => client.chat.completions.create({ ...question, temprature: 1 }));
    await fails(404, OpenAI.NotFoundError, () => client.chat.completions.create({ ...question, model: "gpt-9" }));
    await fails(404, OpenAI.NotFoundError, () => client.responses.retrieve("resp_none"));
    await fails(501, OpenAI.InternalServerError, () => client.embeddings.create({ model, input: "pear" }));
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    console.error(`FAILED ${name}\n${error.stack}`);
    process.exit(1);
  }
  console.log(`ok ${name}`);
}
