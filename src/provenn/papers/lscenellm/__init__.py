"""LSceneLLM: a language model looks into a large scene where its own attention says (arXiv:2412.01292)."""
