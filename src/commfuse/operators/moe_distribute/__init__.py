"""The MoE token exchange: dispatch, combine and their relatives."""
