/// Tokens that one request may name by bias, as a stop or as its end, together: a device keeps room for that many in every
/// row of a step. OpenAI takes 300 biases.
pub const MAX_NAMED_TOKENS: usize = 512;

/// How a request wants its tokens chosen. Names and meanings are OpenAI's and vLLM's.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens until their probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// > 1 makes tokens of prompt and output less likely (divides positive logits, multiplies negative ones).
    pub repetition_penalty: f32,
    /// Subtracted once from every token already generated.
    pub presence_penalty: f32,
    /// Subtracted per occurrence of every token already generated.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    pub max_tokens: usize,
    /// No end-of-sequence or stop before this many tokens.
    pub min_tokens: usize,
    /// Strings that end the output; not part of it.
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    /// Go on past end-of-sequence until `max_tokens`.
    pub ignore_eos: bool,
    /// `Some(n)`: the chosen token's logprob and those of the n likeliest (n may be 0).
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}
