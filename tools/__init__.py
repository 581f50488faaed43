"""The `dirtmap` command, which a person or another program starts. Of the engine it uses the public interface only."""
