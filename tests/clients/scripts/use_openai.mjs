// The npm package `openai`.
import OpenAI from "openai";
import { readFileSync } from "node:fs";

const given = JSON.parse(readFileSync(0, "utf-8"));
const client = new OpenAI({ baseURL: `${given.http}/v1`, apiKey: "none", maxRetries: 0 });

const vectors = (answer) => answer.data.map((each) => Array.from(each.embedding));

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return { class: error.constructor.name, text: error.message };
  }
  throw new Error("expected a refusal and got an answer");
}

const { model, texts } = given;
const answer = await client.embeddings.create({ model, input: texts });
const models = [];
for await (const each of client.models.list()) models.push(each.id);
const calls = texts.map((input) => client.embeddings.create({ model, input }));
console.log(
  JSON.stringify({
    default: vectors(answer),
    usage: answer.usage,
    model: answer.model,
    floats: vectors(await client.embeddings.create({ model, input: texts, encoding_format: "float" })),
    at_once: (await Promise.all(calls)).flatMap(vectors),
    models,
    one_model: (await client.models.retrieve(model)).id,
    unknown_model: await refusal(() => client.embeddings.create({ model: "no-such-model", input: "a" })),
    token_ids: await refusal(() => client.embeddings.create({ model, input: [1, 2, 3] })),
  }),
);
