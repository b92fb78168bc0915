"""From one YAML file to an adapter and its report: settings, model, trainer, pipeline."""
