"""The study: arms of tuning policies over seeds from one shared first stage, measured alike and compared with intervals."""
