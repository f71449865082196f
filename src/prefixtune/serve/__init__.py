"""An OpenAI-compatible server: one base model, many prefixes, one batch.

Reading order: `config` (the knobs), `store` (names to prefixes), `engine` (rows of token ids) with `job`,
`sampling`, `layout` and `selftest`; `prompts` and `text` (tokens from and to text), `service` (what a request
becomes) with `running`; `schema`, `answers` and `problems` (what OpenAI's clients send and get), `guard`,
`api`, `server`.
"""
