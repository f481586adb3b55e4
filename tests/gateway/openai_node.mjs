// What `openai` for Node gets through the gateway: node openai_node.mjs URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const ask = {
  model: "assistant",
  messages: [{ role: "user", content: "Where is my order?" }],
  max_tokens: 16,
  temperature: 0,
};
const { data: whole, response } = await client.chat.completions.create(ask).withResponse();
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const models = await client.models.list();
let refused;
try {
  await client.chat.completions.create({ ...ask, model: "another" });
} catch (error) {
  refused = { name: error.constructor.name, status: error.status, code: error.code };
}
console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    id: whole.id,
    response_id: response.headers.get("x-thumbwheel-response-id"),
    models: models.data.map((model) => model.id),
    refused,
  }),
);
