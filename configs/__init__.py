"""Configuration of the command line, composed by Hydra: ``config.yaml`` and the groups model, sampler, reward, experiment."""

if __name__ != "diffsteer.configs":
    raise ImportError(f"import diffsteer.configs, not {__name__}")
