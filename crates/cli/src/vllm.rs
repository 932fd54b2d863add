//! A vLLM server that returns which experts each token was routed to (`vllm serve MODEL --enable-return-routed-experts`).

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use quorate_lens::interchange::RoutedExperts;
use serde_json::{Value, json};

/// Longest time that one request may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 30;

/// A server and the model that it serves.
pub struct Server {
    agent: ureq::Agent,
    /// Without a slash at the end, with `/v1`.
    base: String,
    model: String,
}

impl Server {
    /// Asks the server for its model. `url` is that of the server, with or without `/v1`.
    pub fn connect(url: &str) -> Result<Server> {
        if !url.starts_with("http://") {
            bail!("`{url}` is no http:// address; help: for a server behind https, open a tunnel to it (ssh -L)");
        }
        let base = url.trim_end_matches('/');
        let base = format!("{}/v1", base.strip_suffix("/v1").unwrap_or(base));
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
        let mut server = Server { agent: config.build().into(), base, model: String::new() };
        let request = server.agent.get(format!("{}/models", server.base)).call();
        let models = server.answer(request)?;
        let model = models["data"][0]["id"].as_str();
        server.model = model.ok_or_else(|| anyhow!("{} does not tell its model", server.base))?.to_string();
        Ok(server)
    }

    /// Name of the served model.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The experts of each of `tokens` in each layer.
    pub fn routed_experts(&self, tokens: &[u32]) -> Result<RoutedExperts> {
        let body = json!({
            "model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "add_special_tokens": false,
        });
        let request = self.agent.post(format!("{}/completions", self.base)).header("content-type", "application/json");
        let answer = self.answer(request.send(body.to_string()))?;
        of_answer(&answer, tokens.len())
    }

    /// The JSON of an answer, or the server's complaint.
    fn answer(&self, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value> {
        let base = &self.base;
        let mut response = response.with_context(|| {
            format!("cannot reach the server at {base}; help: is `vllm serve MODEL --enable-return-routed-experts` running there?")
        })?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        let text = text.with_context(|| format!("the answer of {base} broke off"))?;
        let value: Result<Value, _> = serde_json::from_str(&text);
        if !status.is_success() {
            let message =
                value.ok().and_then(|v| Some(v.get("error").unwrap_or(&v).get("message")?.as_str()?.to_string()));
            let message = message.unwrap_or_else(|| text.chars().take(200).collect());
            bail!("the server at {base} refuses ({status}): {}", message.trim());
        }
        value.with_context(|| format!("{base} did not answer in JSON; help: is it an OpenAI-compatible server?"))
    }
}

/// The first `tokens` tokens' experts in an answer. Servers since 0.22 give one array with the prompt first, as base64 of
/// numpy's format; 0.21 gave the prompt's apart, as nested arrays.
fn of_answer(answer: &Value, tokens: usize) -> Result<RoutedExperts> {
    let given = [&answer["prompt_routed_experts"], &answer["choices"][0]["routed_experts"]];
    let Some(value) = given.into_iter().find(|v| !v.is_null()) else {
        bail!(
            "the server returned no routed experts; help: start it with `vllm serve MODEL --enable-return-routed-experts`"
        );
    };
    let read = || -> Result<RoutedExperts, String> {
        let Some(text) = value.as_str() else { return RoutedExperts::from_json(value) };
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(|e| e.to_string())?;
        let mut items = RoutedExperts::from_npy(&bytes)?;
        if items.len() == 1 { Ok(items.remove(0)) } else { Err(format!("{} texts for one", items.len())) }
    };
    let mut found = read().map_err(|e| anyhow!("the server's routed experts cannot be read: {e}"))?;
    let [rows, layers, k] = found.shape;
    if rows < tokens {
        bail!(
            "the server returned the experts of {rows} tokens for {tokens}; \
             help: its version may return only those of generated tokens or of tokens outside its prefix cache"
        );
    }
    found.ids.truncate(tokens * layers * k);
    found.shape[0] = tokens;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_both_kinds() {
        let nested = json!([[[0, 1]], [[2, 3]], [[1, 0]]]);
        let found = of_answer(&json!({ "prompt_routed_experts": nested, "choices": [{ "routed_experts": null }] }), 2);
        assert_eq!(found.unwrap(), RoutedExperts { shape: [2, 1, 2], ids: vec![0, 1, 2, 3] });
        let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, 2), }\n";
        let bytes =
            [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), &[0, 1, 2, 3]].concat();
        let text = base64::engine::general_purpose::STANDARD.encode(bytes);
        let answer = json!({ "choices": [{ "routed_experts": text }] });
        assert_eq!(of_answer(&answer, 2).unwrap().ids, [0, 1, 2, 3]);
        assert!(of_answer(&answer, 3).unwrap_err().to_string().contains("2 tokens for 3"));
        let none = of_answer(&json!({ "choices": [{}] }), 1).unwrap_err().to_string();
        assert!(none.contains("--enable-return-routed-experts"), "{none}");
        assert!(of_answer(&json!({ "choices": [{ "routed_experts": "?" }] }), 1).is_err());
    }
}
