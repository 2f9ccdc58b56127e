// In a page the answers lie in it, one for each condition; what is set is looked up.
class Answers {
  constructor({ runs, cards, ...traits }) {
    Object.assign(this, { runs, cards, traits, listeners: {} });
    this.save_changes();
  }

  get(name) {
    return this.traits[name];
  }

  set(name, value) {
    this.traits[name] = value;
  }

  on(event, listener) {
    (this.listeners[event] ??= []).push(listener);
  }

  off(event, listener) {
    this.listeners[event] = this.listeners[event].filter((other) => other !== listener);
  }

  control(name) {
    return this.traits.about.controls.find((control) => control.name === name);
  }

  run(perturbation, strength, where) {
    const { nats } = this.traits.passage;
    if (strength === this.control(perturbation).neutral) return { nats };
    return this.runs.find(
      (run) =>
        run.perturbation === perturbation && run.strength === strength && run.where === where,
    );
  }

  /** What a kernel would do. */
  save_changes() {
    const { about, perturbation, strength, where, expert, asked } = this.traits;
    const run = this.run(perturbation, strength, where);
    const { strengths } = this.control(perturbation);
    const nats = strengths.map((s) => this.run(perturbation, s, where)?.nats ?? null);
    const picked = (card) =>
      card.site === about.sites[expert[0]]?.name && card.expert === expert[1];
    Object.assign(this.traits, {
      run: run ?? { nats: this.traits.passage.nats },
      curve: { nats },
      card: this.cards.find(picked) ?? {},
      message: run ? "" : `This page has no ${perturbation} ${strength} at ${where}.`,
      answered: asked,
    });
    this.listeners["change:answered"]?.forEach((listener) => listener());
  }
}

const answers = JSON.parse(document.getElementById("answers").textContent);
render({ model: new Answers(answers), el: document.getElementById("explorer") });
