"""A folder with all that a model needs where it will run: ``deploying`` has the verb, a module for each target."""
