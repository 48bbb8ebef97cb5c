"""The face that the e2b SDK takes for its cloud: HTTP, as read from the SDK itself. It needs ``cardcage[sandbox]``."""
