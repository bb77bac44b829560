"""One page per algorithm, and a YAML file per experiment."""
